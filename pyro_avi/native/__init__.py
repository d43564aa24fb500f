"""What is written in C++ because torch takes long for it, built once for a machine."""
