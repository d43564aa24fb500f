"""What the guides share: everything but their inference functions, and the guide of the globals."""
