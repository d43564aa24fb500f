"""Many steps of a training in one call."""
