"""Whole-model benchmarks; run them from a checkout."""
