"""Graphs of tensor operations rewritten before they are compiled; only rounding changes."""
