"""`python -m experiments.cuda`: all that waits for a CUDA device, in pieces of a bounded time, and a page of it.

The tests of the marker `cuda`, then the sweeps `speed` and `images --preset paper` on the device. The same command goes on
where time was over. With `--rehearse` it does the same at the smallest sizes on the CPU, so that no hour with a device is
lost to what could have been seen before.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from experiments.files import write_whole
from experiments.machine import device_name, usable_cores
from experiments.report import document
from experiments.reporting.document import Document, Note
from experiments.reporting.pages import save
from experiments.reporting.records import ReportError
from experiments.reporting.tables import Column, Table

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
# Seconds of the time that are left for the page, and those that a part has to end itself.
_RESERVE, _PATIENCE = 40.0, 20.0
# Of what a part says so many characters are shown here; all of it is in its log.
_SHOWN = 4_000
#: Exit codes: all is done; a part has failed; the command is wrong; time was over.
_DONE, _FAILED, _WRONG, _TIME_OVER = 0, 1, 2, 3


class _Part(NamedTuple):
    """One of the commands: its name, and what stands behind ``python``."""

    name: str
    command: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    0: all parts are done; 1: one of them failed; 2: the command is wrong; 3: time was over, and the same command goes on.
    """
    options = _parse(argv)
    if not options.rehearse and (missing := _without_device()):
        print(missing, file=sys.stderr)
        return _WRONG
    # So that a part ends with the command that started it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    deadline = time.monotonic() + options.seconds - _RESERVE
    kept = options.out / "parts"
    kept.mkdir(parents=True, exist_ok=True)
    records = [_run(part, kept, deadline) for part in _parts(options)]
    device = device_name("cpu" if options.rehearse else "cuda")
    print(f"\nPage: {_draw(records, options.out, device)}")
    if any(record["exit"] is None for record in records):
        print("Time is over: the same command goes on.")
        return _TIME_OVER
    return _FAILED if any(record["exit"] for record in records) else _DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cuda", description="Run all that waits for a CUDA device, and draw a page of it."
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results-cuda"), help="folder of the records (default: results-cuda)")
    add("--seconds", type=float, default=540.0, help="time of this call, at least 60 (default: 540)")
    add("--data-dir", help="folder of MNIST (default: the environment variable PYRO_AVI_DATA)")
    add("--rehearse", action="store_true", help="the same in small, on the CPU")
    options = parser.parse_args(argv)
    if options.seconds < 60:
        parser.error(f"expected --seconds of at least 60, got {options.seconds:g}")
    return options


def _without_device() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    return (
        f"error: Expected a CUDA device, but torch {torch.__version__} finds none.\nTry one of the following fixes:\n"
        "- install a CUDA build of torch and check the driver\n"
        "- python -m experiments.cuda --rehearse, for the same in small on the CPU"
    )


def _parts(options: argparse.Namespace) -> list[_Part]:
    """All parts, what matters most first."""
    # Not as `pytest` of this checkout is configured: the machine may lack a plugin, and have versions with other warnings.
    marked = [str(path) for path in sorted((_ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    tests = ["-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-W", "default"]
    # Beside each other where there is pytest-xdist: most of their time is compiling.
    tests += ["-n", _share(2)] if find_spec("xdist") else []
    tests += ["-q", "-m", "cuda", "--junitxml", str(options.out.resolve() / "parts" / "tests.xml"), *marked]
    common = ["--device", "cpu" if options.rehearse else "cuda", "--out", str(options.out.resolve())]
    common += ["--data-dir", options.data_dir] if options.data_dir else []

    def sweep(name: str, *settings: str) -> list[str]:
        # Cells of `speed`, of ten processes each, get ready beside each other and are timed alone.
        jobs = "1" if options.rehearse else _share(5 if name == "speed" else 2)
        return ["-m", "experiments.sweep", name, *settings, "--jobs", jobs, *common]

    if options.rehearse:
        speed = ["--preset", "trial", "--workloads", "tiny, A-VI k=16, batch 20"]
        speed += ["--ways", "compiled", "hand", "hand graph", "numpyro"]
        images = ["--dataset", "digits", "--num-train", "64", "--batch-size", "32", "--steps", "4"]
        images += ["--seeds", "0", "--guides", "amortized", "--widths", "2"]
        return [
            _Part("tests", tests),
            _Part("speed", sweep("speed", *speed)),
            _Part("images", sweep("images", "--preset", "paper", *images)),
        ]
    return [
        _Part("tests", tests),
        _Part("speed", sweep("speed")),
        _Part("images, one seed", sweep("images", "--preset", "paper", "--seeds", "1954")),
        _Part("images, all seeds", sweep("images", "--preset", "paper")),
    ]


def _share(cores: int) -> str:
    """How many run at a time that take so many cores each, eight at most: they share one device."""
    return str(max(1, min(8, usable_cores() // cores)))


def _run(part: _Part, folder: Path, deadline: float) -> dict[str, Any]:
    """Run a part that is not done, as long as there is time; its record, which is kept.

    Its ``exit`` is the exit code, ``None`` where time was over; ``seconds`` are those of all calls.
    """
    path = folder / f"{part.name.replace(', ', '-').replace(' ', '-')}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    left = deadline - time.monotonic()
    # Tests that fail would fail again. Without time to start nothing is begun.
    if before.get("exit") == _DONE or before.get("tests") or left < _PATIENCE:
        return before or {"part": part.name, "exit": None, "seconds": 0.0}
    print(f"\n== {part.name}, {left:.0f} s left", flush=True)
    began, results = time.monotonic(), path.with_suffix(".xml")
    results.unlink(missing_ok=True)
    code, last = _call([sys.executable, *part.command], path.with_suffix(".log"), left)
    record = {
        "part": part.name,
        "command": shlex.join(["python", *(Path(word).name if os.sep in word else word for word in part.command)]),
        "exit": code,
        "seconds": before.get("seconds", 0.0) + time.monotonic() - began,
        "reason": last if code else "",
    }
    if results.exists() and code is not None:
        record["tests"] = _read_tests(results)
    write_whole(path, json.dumps(record, indent=1).encode())
    return record


def _call(command: list[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """The exit code of a command, ``None`` where it was stopped, and the last line of what it said."""
    with log.open("wb") as file:
        # In a process group of its own, as it starts others.
        process = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=file, start_new_session=True)
        code: int | None = None
        try:
            code = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            # As Ctrl-C: what is finished is kept.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = log.read_text(errors="replace").strip()
    print(said[-_SHOWN:], flush=True)
    return code, said.rpartition("\n")[2]


def _read_tests(path: Path) -> list[dict[str, Any]]:
    """Name, outcome, seconds and message of every test in a JUnit file."""
    found = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        found.append({
            "test": f"{case.get('classname')}.{case.get('name')}",
            "outcome": {"failure": "failed", "error": "failed"}.get(outcomes[0].tag, "skipped") if outcomes else "passed",
            "seconds": float(case.get("time", 0.0)),
            "message": (outcomes[0].get("message") or "")[:1_000] if outcomes else "",
        })  # fmt: skip
    return found


def _draw(records: list[dict[str, Any]], out: Path, device: str) -> Path:
    """Write the page of all parts; the path of it."""
    tests = [test for record in records for test in record.get("tests", [])]
    tables = [Table("Parts", [Column("part", "part"), Column("state", _state), Column("seconds", "seconds")], records)]
    if tests:
        tables.append(
            Table("Tests", [Column(name, name) for name in ("test", "outcome", "seconds")], tests, file="tests")
        )
    reports = [_report(name, out) for name in ("speed", "images")]
    lead = f"Device: {device}. Tests of the library on it, the speed of its steps, and the published images."
    drawn = Document(
        "On CUDA",
        lead,
        list(_notes(records, tests)),
        tables,
        parts=[report for report in reports if report is not None],
    )
    return save(drawn, out / "page")


def _state(record: dict[str, Any]) -> str:
    if record["exit"] is None:
        return "to go on"
    return "failed" if record["exit"] else "done"


def _notes(records: list[dict[str, Any]], tests: list[dict[str, Any]]) -> Iterator[Note]:
    """What the tests say, and why parts have failed."""
    if tests:
        count = {
            outcome: sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "failed", "skipped")
        }
        said = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number)
        yield Note("warning" if count["failed"] else "answer", f"{said}.", "Tests")
    for record in records:
        if record["exit"] and not record.get("tests"):
            yield Note("warning", record["reason"], f"Failed: {record['part']}")


def _report(name: str, out: Path) -> Document | None:
    """The report of a sweep; ``None`` where it has no record yet."""
    try:
        drawn = document(name, out)
    except ReportError:
        return None
    for table in (table for part in drawn.walk() for table in part.tables):
        # Reports name their files each for itself.
        table.file = table.file and f"{name}-{table.file}"
    return drawn


if __name__ == "__main__":
    sys.exit(main())
