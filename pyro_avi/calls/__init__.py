"""Where the rows and observed values of a call come from."""
