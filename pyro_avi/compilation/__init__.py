"""Functions of tensors as compiled graphs."""
