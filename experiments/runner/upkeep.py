"""The care of a store: what state its cells are in, whether its records are whole, and what of it nobody needs."""

from collections import Counter
from pathlib import Path

from experiments.runner.cell import Cell
from experiments.runner.scheduler import Scheduler, reason_of

__all__ = ["prune", "show_status", "verify"]

_STATES = ("finished", "running", "failed", "damaged", "missing")


def show_status(scheduler: Scheduler) -> int:
    """Print the state of every cell that can be named, and how many are in each; changes nothing. Returns 0."""
    cells = scheduler.planned()
    marks = scheduler.store.failures(scheduler.name)
    counted: Counter[str] = Counter()
    for cell in cells:
        state = _state(scheduler, cell, failed=cell.key in marks)
        reason = ""
        if state == "failed":
            reason = f": {reason_of(marks[cell.key]['failure'])}"
        elif state == "damaged":
            reason = f": {scheduler.contents.damaged[scheduler.store.path(cell)]}"
        counted[state] += 1
        print(f"{cell.key}  {state:>8}  {scheduler.describe(cell)}{reason}")
    if later := max(0, scheduler.total - len(cells)):
        print(f"and {later} cells that are named when these are finished")
    print(f"{scheduler.total} cells: {', '.join(f'{counted[state]} {state}' for state in _STATES)}.")
    return 0


def _state(scheduler: Scheduler, cell: Cell, *, failed: bool) -> str:
    if cell.key in scheduler.records:
        return "finished"
    if scheduler.store.is_claimed(cell):
        return "running"
    if scheduler.store.path(cell) in scheduler.contents.damaged:
        return "damaged"
    return "failed" if failed else "missing"


def verify(scheduler: Scheduler) -> int:
    """Print which files of the sweep's folder hold no whole record, and why; changes nothing. Returns 1 if there are any."""
    contents = scheduler.contents
    for path, reason in contents.damaged.items():
        print(f"{path}: {reason}")
    print(f"{len(contents.records)} records are whole, {len(contents.damaged)} files are damaged or foreign.")
    if contents.earlier:
        print(
            f"{len(contents.earlier)} of the records are of an earlier format, without a checksum: their form is checked, "
            "and a changed number in them is not found."
        )
    return 1 if contents.damaged else 0


def prune(scheduler: Scheduler, *, remove: bool) -> int:
    """Print what nobody needs, and with `remove` remove it. Returns 0.

    That are records and failures of cells that the sweep with these options does not name, and what those have kept to go on
    from; what was set aside, and half files of killed writers. As long as later stages cannot be named, no record is one that
    the sweep does not name.

    Raises:
        StoreError: a file cannot be removed.
    """
    store, name = scheduler.store, scheduler.name
    unneeded: dict[Path, str] = {}
    planned = scheduler.planned()
    if len(planned) < scheduler.total:
        print("Every record is kept: cells of later stages are named when those before them are finished.")
    else:
        named = {cell.key for cell in planned}
        for record in (*scheduler.records.values(), *store.failures(name).values()):
            cell = Cell(record["sweep"], record["settings"])
            if cell.key not in named:
                path = store.failure_path(cell) if "failure" in record else store.path(cell)
                unneeded[path] = scheduler.describe(cell)
        kept = store.scratch(name).glob("*")
        unneeded |= {path: "of an unfinished cell that is not named" for path in sorted(kept) if path.name not in named}
    # Of cells whose process was killed between their record and this.
    finished = (store.scratch(name) / key for key in scheduler.records)
    unneeded |= {path: "of a cell that is finished" for path in finished if path.exists()}
    unneeded |= {path: "set aside" for path in sorted(store.aside(name).glob("*")) if not path.is_dir()}
    unneeded |= {path: "half a file, of a writer that was killed" for path in store.leftovers(name)}
    removed = store.remove(name, unneeded) if remove else list(unneeded)
    for path in removed:
        print(f"{path}  {unneeded[path]}")
    told = "removed" if remove else "would be removed by --prune --yes. Nothing was changed"
    print(f"{len(removed)} files {told}.")
    return 0
