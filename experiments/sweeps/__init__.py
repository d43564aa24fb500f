"""The sweeps: one experiment a folder. The path is the registry.

A sweep NAME is the module `experiments.sweeps.NAME`: a folder of this package, or a folder or a single file in a folder
that the environment variable `PYRO_AVI_SWEEPS` names (several are separated as in `PATH`), so that an experiment of one's
own needs no change of the checkout. Names that begin with an underscore are helpers. A sweep offers

    summary: str                                    one line for `--list`
    add_arguments(parser)                           its own options
    plan(options, records) -> list[Cell]            all cells that can be named now, given the finished records by key
    count(options) -> int                           the cells of all stages
    describe(cell) -> str                           a short label
    estimate(cell, *, device) -> float              seconds, roughly
    run(settings, context) -> dict                  the result, as JSON: None in place of a number that is not finite
    document(records) -> Document                   the report of these records, by key; a sweep without it has none
    demands(cell, *, device) -> dict                what the cell takes of a cluster: `num_cpus`, `num_gpus`, `memory` in bytes;
                                                    without it a core, and on "cuda" a GPU

`plan` is asked again whenever the cells it named are finished (cells that tune a learning rate come first, then those
that use it) and while other processes run some of them, so it is quick. A sweep is finished when `plan` names no cell
that the store lacks. `plan` and `count` raise ValueError, with a message for the user, for options that are bad or
contradict one another. `document` raises ReportError where records lack what it needs.

`run` may keep what it goes on from when its process is killed: `context.scratch.checkpoint(name)` is a file for
`checkpoint=` of `pyro_avi.fit`, and `context.scratch.once(name, compute)` the result of a part, as JSON, that is computed
once. Both are removed when the record is written (`experiments/runner/scratch.py`).

The sweeps of this package are laid out alike: `__init__` is what is listed above, `cells` names the cells, `report` draws
them, and further files do the work of a cell. `run` and `document` import what they need when they are called: planning
needs no torch, and running draws nothing.
"""

import os

__path__ = [*__path__, *filter(None, os.environ.get("PYRO_AVI_SWEEPS", "").split(os.pathsep))]
