"""An edit of concept erasure: its file, where it meets a pipeline, applying it and taking it back."""
