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

from experiments import engines, sweeps
from experiments.cell import Cell
from experiments.engines import Engine
from experiments.progress import Display
from experiments.run import Context, one_thread, usable_cores
from experiments.store import Store, StoreError
from experiments.work import Work

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
    work = None
    try:
        # Before torch is imported: what is loaded first takes its number of threads from the environment.
        with _stoppable(), one_thread():
            try:
                options = _parse(argv)
                if options.list:
                    return _list()
                work = Work(sweeps.find(options.name), options, Store(options.out))
                cells = work.planned()
                device = _device(options.device)
                jobs = options.jobs or (1 if device == "cuda" else usable_cores())
                context = Context(device, options.data_dir, options.download, command=_command(argv))
                engine = engines.create(
                    options.engine or ("serial" if jobs == 1 else "processes"), jobs=jobs, context=context
                )
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            if options.dry_run:
                return _dry_run(work, cells, device=device, jobs=jobs)
            return _run(work, engine)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except _Stopped as stop:
        done = "Nothing was run." if work is None else f"{work.finished()} of {work.total} cells are finished and kept:"
        again = "" if work is None else " the same command resumes."
        print(f"Stopped by {signal.Signals(stop.number).name}. {done}{again}", file=sys.stderr)
        return 128 + stop.number


def _parse(argv: list[str]) -> argparse.Namespace:
    # The name decides which options there are, so it is looked for before they are known: in the first place only,
    # for later it cannot be told from the value of an option.
    name = argv[0] if argv and not argv[0].startswith("-") else _DEFAULT
    module = sweeps.find(name)
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
        "--engine", choices=engines.names(), help="what runs the cells (default: serial for one job, else processes)"
    )
    common.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, CUDA where there is one"
    )
    common.add_argument("--data-dir", help="folder of the data sets (default: the environment variable PYRO_AVI_DATA)")
    common.add_argument("--download", action="store_true", help="download data sets that are missing")
    common.add_argument("--list", action="store_true", help="list the sweeps and stop")
    common.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time and stop")
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    if options.name != name:
        raise ValueError(f"Expected the name of the sweep first: {_PROG} {options.name} [options].")
    return options


def _job_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _device(asked: str) -> str:
    if asked == "cpu":
        return "cpu"
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
    """The command without the options that hold paths of this machine: it is kept in every record."""
    paths = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    paths.add_argument("--out")
    paths.add_argument("--data-dir")
    return shlex.join([*_PROG.split(), *paths.parse_known_args(argv)[1]])


def _list() -> int:
    names = sweeps.names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {sweeps.find(name).summary}")
    return 0


def _dry_run(work: Work, cells: list[Cell], *, device: str, jobs: int) -> int:
    seconds = {cell: work.module.estimate(cell, device=device) for cell in cells}
    missing = [cell for cell in cells if cell.key not in work.records]
    for cell in cells:
        state = f"~{seconds[cell]:.0f} s" if cell in missing else "finished"
        print(f"{cell.key}  {state:>9}  {work.module.describe(cell)}")
    later = max(0, work.total - len(cells))
    if later:
        print(f"and {later} cells that are named when these are finished")
    # Cells that cannot be named yet are taken to cost what those that can do on average.
    left = sum(seconds[cell] for cell in missing) + later * sum(seconds.values()) / max(1, len(seconds))
    todo = len(missing) + later
    print(f"{work.total} cells, {len(cells) - len(missing)} finished, {todo} to run.")
    print(f"Estimate: {_duration(left / max(1, min(jobs, todo)))} on {device}, jobs: {jobs}.")
    return 0


def _run(work: Work, engine: Engine) -> int:
    work.store.prepare(work.name)
    begin = time.monotonic()
    try:
        with (
            engine,
            Display(work.name, total=work.total, finished=work.finished(), describe=work.module.describe) as display,
        ):
            work.run(engine, display)
    finally:
        for cell, failure in work.failures.items():
            print(f"\nfailed: {work.module.describe(cell)} ({cell.key})\n{failure}", file=sys.stderr)
    drawn = _report(work) if work.finished() else 0
    if eager := work.not_compiled():
        print(
            f"{len(eager)} of the cells were to be compiled and were not: their records and the report say why. To run them "
            f"again, move these files of {work.store.folder(work.name)} away: {' '.join(f'{c.key}.json' for c in eager)}"
        )
    ran, reused = len(work.ran), work.finished() - len(work.ran)
    took = _duration(time.monotonic() - begin)
    print(f"{work.total} cells: {ran} run, {reused} reused, {len(work.failures)} failed, {took}.")
    return 1 if work.failures else drawn


def _report(work: Work) -> int:
    # Drawing needs libraries that running does not.
    report = importlib.import_module("experiments.report")
    if work.name not in report.names():
        print(f"The sweep {work.name} has no report. Its records: {work.store.folder(work.name)}")
        return 0
    try:
        page = report.write(work.name, work.store.out)
        print(report.table_text(work.name, work.store.out))
    except report.ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Report: {page}")
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
