"""The reports, one a module: ``document(records)`` in the module named like the sweep. That path is the registry.

The reports of sweeps of one's own are in the folder ``reports`` of the folder that `PYRO_AVI_SWEEPS` names.
"""

from pathlib import Path

from experiments.sweeps import folders

__path__ = [*__path__, *(str(Path(folder) / "reports") for folder in folders())]
