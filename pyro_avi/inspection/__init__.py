"""What a model consists of, and where the data of a call come from."""
