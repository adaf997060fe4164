"""What diffaccel reads and writes: pictures, metadata, tensors; written whole or not at all."""
