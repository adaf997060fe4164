"""One file per family of networks, with all of its facts. They were read in diffusers 0.42."""
