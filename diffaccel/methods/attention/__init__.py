"""What attends to what: sparse patterns, and attention to the text."""
