"""`python -m experiments.sweep [NAME]`: runs the cells of a sweep that the store lacks, then draws the report."""

import argparse
import importlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from experiments.machine import usable_cores
from experiments.runner import engines, registry, upkeep
from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, EngineError
from experiments.runner.progress import Display
from experiments.runner.run_cell import Context, one_thread
from experiments.runner.scheduler import Scheduler
from experiments.runner.store import Store, StoreError
from experiments.shared_folder import sharing

__all__ = ["main"]

_DEFAULT = "images"
_PROG = "python -m experiments.sweep"
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """The user or the system stops the sweep. No code on the way takes it for an error or an interrupt of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    0: every cell has its record; 1: a cell, the store or the report failed; 2: the command is wrong; 128 + N: stopped
    by signal N (130 after Ctrl-C).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    scheduler = None
    try:
        # Before torch is imported: what is loaded first takes its number of threads from the environment.
        with _stoppable(), one_thread(), sharing():
            try:
                options = _parse(argv)
                if options.list:
                    return _list()
                # Some sweeps plan other cells for another device.
                device = options.device = _device(options)
                scheduler = Scheduler(registry.find(options.name), options, Store(options.out))
                cells = scheduler.planned()
                if (kept := _upkeep(scheduler, options)) is not None:
                    return kept
                jobs = options.jobs or (1 if device == "cuda" else usable_cores())
                context = Context(
                    device, options.data_dir, options.download, command=_command(argv), store=str(options.out.resolve())
                )
                # A cluster knows best how much it can do at a time.
                engine = engines.create(
                    options.engine or _usual_engine(options, jobs),
                    jobs=options.jobs if options.address else jobs,
                    context=context,
                    address=options.address,
                )
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            if options.dry_run:
                return _dry_run(scheduler, cells, device=device, jobs=jobs)
            return _run(scheduler, engine)
    except (StoreError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except _Stopped as stop:
        done = "Nothing was run."
        if scheduler is not None:
            finished = f"{scheduler.finished()} of {scheduler.total} cells are finished and kept"
            goes_on = ", what runs on the cluster goes on" if scheduler.options.address else ""
            done = f"{finished}{goes_on}: the same command resumes."
        print(f"Stopped by {signal.Signals(stop.number).name}. {done}", file=sys.stderr)
        return 128 + stop.number


def _parse(argv: list[str]) -> argparse.Namespace:
    # The name decides which options there are, so it is looked for before they are known: in the first place only,
    # for later it cannot be told from the value of an option.
    name = argv[0] if argv and not argv[0].startswith("-") else _DEFAULT
    module = registry.find(name)
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=f"Run the cells of a sweep that the store lacks, then draw the report. {name}: {module.summary}.",
        epilog=f"Options depend on the sweep: {_PROG} NAME --help. Ctrl-C stops; the same command resumes.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", default=name, help=f"the sweep (default: {_DEFAULT})")
    common = parser.add_argument_group("options of every sweep")
    common.add_argument("--out", type=Path, default=Path("results"), help="folder of the records (default: results)")
    common.add_argument(
        "--jobs", type=_job_count, help="cells that run at a time (default: the usable cores; 1 on CUDA)"
    )
    common.add_argument(
        "--engine",
        choices=engines.names(),
        help="what runs the cells (default: ray with --address, serial for one job, else processes)",
    )
    common.add_argument(
        "--address", help="of a Ray cluster to run on; --jobs is then all it can do, --device auto its CPUs"
    )
    common.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, CUDA where there is one"
    )
    common.add_argument("--data-dir", help="folder of the data sets (default: the environment variable PYRO_AVI_DATA)")
    common.add_argument("--download", action="store_true", help="download data sets that are missing")
    common.add_argument("--yes", action="store_true", help="with --prune: remove what it lists")
    instead = common.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="list the sweeps and stop")
    instead.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time and stop")
    instead.add_argument("--status", action="store_true", help="print the state of every cell and stop")
    instead.add_argument("--verify", action="store_true", help="check every record, its checksum too, and stop")
    instead.add_argument("--prune", action="store_true", help="list the files of the store that nobody needs and stop")
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    if options.name != name:
        raise ValueError(f"Expected the name of the sweep first: {_PROG} {options.name} [options].")
    if options.yes and not options.prune:
        raise ValueError("Expected --yes beside --prune alone, got it without.")
    return options


def _job_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _usual_engine(options: argparse.Namespace, jobs: int) -> str:
    if options.address:
        return "ray"
    return "serial" if jobs == 1 else "processes"


def _device(options: argparse.Namespace) -> str:
    asked, runs = options.device, not (options.status or options.verify or options.prune)
    # The machine that starts a sweep on a cluster may have no GPU when those of the cluster do.
    if asked == "cpu" or options.address or (asked == "cuda" and not runs):
        return "cuda" if asked == "cuda" else "cpu"
    # Seconds to import, and not needed where the device is given.
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ValueError(
            f"Expected a CUDA device (--device cuda), but torch {torch.__version__} finds none. "
            "Use --device cpu, or install a CUDA build of torch and check the driver."
        )
    return "cpu"


def _command(argv: list[str]) -> str:
    """The command without the options that hold paths or addresses of this place: it is kept in every record."""
    paths = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    paths.add_argument("--out")
    paths.add_argument("--data-dir")
    paths.add_argument("--address")
    return shlex.join([*_PROG.split(), *paths.parse_known_args(argv)[1]])


def _list() -> int:
    names = registry.names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {registry.find(name).summary}")
    return 0


def _upkeep(scheduler: Scheduler, options: argparse.Namespace) -> int | None:
    """The exit code of what was asked for instead of a run; None for a run."""
    if options.status:
        return upkeep.show_status(scheduler)
    if options.verify:
        return upkeep.verify(scheduler)
    return upkeep.prune(scheduler, remove=options.yes) if options.prune else None


def _set_aside(scheduler: Scheduler) -> None:
    """What is no record of this sweep must not stop it: its place is free, and it lies elsewhere."""
    damaged = scheduler.contents.damaged
    moved = scheduler.store.set_aside(scheduler.name, damaged)
    if moved:
        lines = [f"  {path.name}: {damaged[path]}" for path in moved]
        told = (
            f"Set aside {len(moved)} damaged or foreign files; they lie in {scheduler.store.aside(scheduler.name)} now:"
        )
        print("\n".join([told, *lines]), file=sys.stderr)


def _dry_run(scheduler: Scheduler, cells: list[Cell], *, device: str, jobs: int) -> int:
    seconds = {cell: scheduler.module.estimate(cell, device=device) for cell in cells}
    missing = [cell for cell in cells if cell.key not in scheduler.records]
    for cell in cells:
        state = f"~{seconds[cell]:.0f} s" if cell in missing else "finished"
        print(f"{cell.key}  {state:>9}  {scheduler.module.describe(cell)}")
    later = max(0, scheduler.total - len(cells))
    if later:
        print(f"and {later} cells that are named when these are finished")
    # Cells that cannot be named yet are taken to cost what those that can do on average.
    left = sum(seconds[cell] for cell in missing) + later * sum(seconds.values()) / max(1, len(seconds))
    todo = len(missing) + later
    print(f"{scheduler.total} cells, {len(cells) - len(missing)} finished, {todo} to run.")
    print(f"Estimate: {_duration(left / max(1, min(jobs, todo)))} on {device}, jobs: {jobs}.")
    return 0


def _run(scheduler: Scheduler, engine: Engine) -> int:
    scheduler.store.prepare(scheduler.name)
    _set_aside(scheduler)
    begin = time.monotonic()
    describe, finished = scheduler.module.describe, scheduler.finished()
    try:
        with engine, Display(scheduler.name, total=scheduler.total, finished=finished, describe=describe) as display:
            scheduler.run(engine, display)
    finally:
        for cell, failure in scheduler.failures.items():
            print(f"\nfailed: {describe(cell)} ({cell.key})\n{failure}", file=sys.stderr)
    drawn = _report(scheduler) if scheduler.finished() else 0
    if eager := scheduler.not_compiled():
        files = " ".join(f"{cell.key}.json" for cell in eager)
        print(
            f"{len(eager)} of the cells were to be compiled and were not: their records and the report say why. To run them "
            f"again, move these files of {scheduler.store.folder(scheduler.name)} away: {files}"
        )
    ran, reused = len(scheduler.ran), scheduler.finished() - len(scheduler.ran)
    took = _duration(time.monotonic() - begin)
    print(f"{scheduler.total} cells: {ran} run, {reused} reused, {len(scheduler.failures)} failed, {took}.")
    return 1 if scheduler.failures else drawn


def _report(scheduler: Scheduler) -> int:
    # Drawing needs libraries that running does not.
    report = importlib.import_module("experiments.report")
    if not report.has_report(scheduler.name):
        print(f"The sweep {scheduler.name} has no report. Its records: {scheduler.store.folder(scheduler.name)}")
        return 0
    try:
        page, text = report.draw(scheduler.name, scheduler.store.out)
    except report.ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}\n\nReport: {page}")
    return 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM raises _Stopped; a second one ends the process at once."""
    before = {number: signal.getsignal(number) for number in _STOPPING}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _STOPPING:
            signal.signal(each, signal.SIG_DFL)
        raise _Stopped(number)

    for number in _STOPPING:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
