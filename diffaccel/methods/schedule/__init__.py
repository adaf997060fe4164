"""Which noise levels the solver visits."""
