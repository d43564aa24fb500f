"""The rows of a plate: the subsample that a call is about, and the parameters that belong to each."""
