"""Models whose evidence is known, by name: what the contract of the measurements runs over.

Each has a few rows of tiny data. Plates of a dimension are written with it and values are indexed from the right, so that
every model also runs under a plate of points.
"""

from tests.measured import calls, chains, discrete, plates, rows, shapes, tied, weighted
from tests.measured.structure import GUIDES, MEASUREMENTS, STRUCTURES, Measured

__all__ = ["GUIDES", "MEASUREMENTS", "STRUCTURES", "Measured"]

# Imported for what they enter.
assert all((rows, shapes, tied, weighted, discrete, chains, plates, calls))
