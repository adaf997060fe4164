"""Model knowledge as data: one file per denoiser family."""
