"""The proof of an edit: pictures before and after, attacks, scores and their sheet."""
