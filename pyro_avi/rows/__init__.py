"""The rows of a plate: which of them a call is about, and what is held for each."""
