"""Functions of tensors as graphs of operations, before anything is compiled."""
