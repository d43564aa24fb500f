"""Compilers and processors, as inductor finds them."""
