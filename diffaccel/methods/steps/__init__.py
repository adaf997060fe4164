"""Which evaluations of the network run at all."""
