"""Fewer tokens inside of the attentions of one evaluation."""
