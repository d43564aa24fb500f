"""The log joint of a model and the log density of a guide, row by row, for any model and any guide."""
