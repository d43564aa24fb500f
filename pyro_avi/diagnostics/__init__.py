"""How good a guide is: gaps, calibration, held-out rows, draws to compare with data."""
