"""Closing the gap of given rows."""
