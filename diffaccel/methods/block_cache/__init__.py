"""The caches that diffusers and cache-dit ship, configured, counted and restored."""
