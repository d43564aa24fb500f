"""The factors of a guide: where variational parameters become sampled sites."""
