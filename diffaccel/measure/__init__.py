"""How far accelerated pictures are from plain ones and what they cost: comparing, timing, scores, plots."""
