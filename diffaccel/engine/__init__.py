"""What happens while an accelerated pipeline runs: the run, its clock, the seams, the methods' base, the report."""
