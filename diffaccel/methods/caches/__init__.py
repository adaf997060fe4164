"""Features of one evaluation that another one uses again, by our own bypass of the blocks between."""
