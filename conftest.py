"""Workers of pytest-xdist share the cores: with more threads of arithmetic than cores every step takes longer."""

import os

from experiments.runner.run_cell import usable_cores

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    # Before torch is loaded, which takes its number of threads from there.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // _workers)))
