"""Region sampling: between dense steps only a part of the image tokens goes through the transformer."""
