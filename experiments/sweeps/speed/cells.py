"""The cells of the sweep `speed`: its options, and what decides each run."""

import argparse
import itertools
from collections.abc import Mapping

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "a training step of the library against hand-written PyTorch, Pyro's SVI and NumPyro"

_DECODER, _PIXELS = (256, 256), 784
# Rows, rows a step, latents a row, layers of the decoder, pixels, guide, width of the encoder, roughly the seconds of a
# hand-written step.
_IMAGES = {
    "A-VI k=64, batch 256": (10_000, 256, 64, _DECODER, _PIXELS, "amortized", 64, 0.015),
    "A-VI k=256, batch 1,000": (10_000, 1_000, 64, _DECODER, _PIXELS, "amortized", 256, 0.06),
    "A-VI k=256, full batch": (10_000, 10_000, 64, _DECODER, _PIXELS, "amortized", 256, 0.4),
    "F-VI, batch 256": (10_000, 256, 64, _DECODER, _PIXELS, "factorized", 0, 0.02),
    "F-VI, full batch": (10_000, 10_000, 64, _DECODER, _PIXELS, "factorized", 0, 0.4),
    "constant, batch 256": (10_000, 256, 64, _DECODER, _PIXELS, "constant", 0, 0.012),
}
_WAYS = (
    "compiled",
    "tf32",
    "bfloat16",
    "eager",
    "hand",
    "hand graph",
    "hand compiled",
    "svi",
    "numpyro",
    "numpyro tf32",
)
_WAYS += ("products",)
# Growth in the number of rows, whose data are made as they are needed.
_ROWS = {
    "F-VI, batch 256, 10^4 rows": (10_000, 256, 64, _DECODER, _PIXELS, "factorized", 0, 0.02),
    "F-VI, batch 256, 10^6 rows": (1_000_000, 256, 64, _DECODER, _PIXELS, "factorized", 0, 0.02),
    "F-VI, 16 latents, batch 256, 10^4 rows": (10_000, 256, 16, _DECODER, _PIXELS, "factorized", 0, 0.02),
    "F-VI, 16 latents, batch 256, 10^7 rows": (10_000_000, 256, 16, _DECODER, _PIXELS, "factorized", 0, 0.02),
}
# What bounds a step is calling its operations.
_SMALL = {
    "tiny, A-VI k=16, batch 20": (200, 20, 2, (4,), 4, "amortized", 16, 0.001),
    "small, A-VI k=64, batch 100": (1_000, 100, 20, (40, 40), _PIXELS, "amortized", 64, 0.003),
    # A cell of the default sweep.
    "small, digits, A-VI k=16, batch 256": (1_797, 256, 8, (64, 64), 64, "amortized", 16, 0.003),
}
_SMALL_WAYS = ("compiled", "five at once", "eager", "hand", "hand graph", "hand compiled", "svi", "numpyro")
_ALL_WAYS = list(dict.fromkeys((*_SMALL_WAYS, *_WAYS)))
# Ways that a CPU does not have.
_CUDA_WAYS = ("tf32", "hand graph", "numpyro tf32")
# By preset the rounds, and how long one is: on a CPU in seconds of steps by hand, on CUDA in steps.
_PRESETS = {"trial": (1, 0.01, 2), "quick": (5, 0.5, 100), "paper": (15, 2.0, 500)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument("--preset", choices=sorted(_PRESETS), default="quick", help="the number of rounds and steps")
    parser.add_argument(
        "--workloads", nargs="+", choices=list(_workloads()), default=list(_workloads()), help="what to train"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=_ALL_WAYS, help="how to take a step (default: all that the device has)"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        help="of a CPU, a cell for each number of them, timed by the clock; run nothing else beside it "
        "(default: one thread, by processor time)",
    )


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    rounds, seconds, on_cuda = _PRESETS[options.preset]
    cuda, cells = options.device == "cuda", []
    if options.threads and (cuda or options.jobs != 1 or min(options.threads) < 1):
        raise ValueError(
            f"Expected --threads of at least 1 with --device cpu and --jobs 1, as the clock counts what else runs, got "
            f"--threads {' '.join(map(str, options.threads))} --device {options.device} --jobs {options.jobs}."
        )
    asked = options.ways or [way for way in _ALL_WAYS if cuda or way not in _CUDA_WAYS]
    for name, threads in itertools.product(options.workloads, options.threads or [None]):
        ways, (num_rows, batch, latents, layers, pixels, guide, width, step) = _workloads()[name]
        settings = {"workload": name, "num_rows": num_rows, "batch_size": batch, "latent_dim": latents}
        settings |= {"layers": layers, "pixels": pixels, "guide": guide, "width": width, "made": name in _ROWS}
        # As many steps a round for every way: rounds are compared.
        settings |= {"rounds": rounds, "steps": on_cuda if cuda else max(1, round(seconds / step)), "seed": 0}
        # Here the device decides the result.
        settings |= {"device": "cuda"} if cuda else {}
        settings |= {"threads": threads} if threads else {}
        chosen = [way for way in asked if way in ways]
        if chosen:
            cells.append(Cell("speed", {**settings, "ways": chosen}))
    return cells


def _workloads() -> dict[str, tuple[tuple[str, ...], tuple]]:
    """By name the ways that apply, and what is trained."""
    return {
        **{name: (_WAYS, workload) for name, workload in _IMAGES.items()},
        **{name: (("compiled", "eager"), workload) for name, workload in _ROWS.items()},
        **{name: (_SMALL_WAYS, workload) for name, workload in _SMALL.items()},
    }


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    return (
        s["workload"] + (" on CUDA" if "device" in s else "") + (f", threads: {s['threads']}" if "threads" in s else "")
    )


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    if device == "cuda":
        # All start at once.
        return 60 + 0.005 * s["rounds"] * s["steps"] * len(s["ways"])
    step = _workloads()[s["workload"]][1][-1]
    # A process takes some seconds to start, and those that compile half a minute.
    return sum(
        (20 if "compiled" in way or way in ("bfloat16", "five at once") else 6) for way in s["ways"]
    ) + 1.2 * step * s["rounds"] * s["steps"] * len(s["ways"])
