"""Memory and file handles of a long training with a checkpoint: `python -m tests.training.long_run --steps 100000`.

With `--cost`: the seconds of writing one of the published size of the image experiment.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import pyro_avi as avi
from experiments.sweeps.images.model import build

STATUS, HANDLES = Path("/proc/self/statm"), Path("/proc/self/fd")


def resident() -> int:
    """The bytes of this process that are in memory."""
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    """The open files of this process, without that by which they are counted."""
    return len(os.listdir(HANDLES)) - 1


def run(steps: int, *, compile: bool, every: int, told=lambda *numbers: None) -> list[tuple[int, int, int]]:
    """Train a table of small rows; the steps, the bytes in memory and the open files ten times on the way."""
    x = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = avi.models.VAE(avi.models.DenseDecoder(2, (3,), (1, 2, 2)), size=20)
    found = []

    def look(fit):
        if fit.steps % (steps // 10) == 0:
            found.append((fit.steps, resident(), handles()))
            told(*found[-1])

    with tempfile.TemporaryDirectory() as folder:
        avi.fit(
            model,
            avi.FactorizedGuide(model),
            batches=avi.minibatches(x, batch_size=5),
            num_steps=steps,
            compile=compile,
            checkpoint=Path(folder) / "training",
            every=every,
            callbacks=[look],
            progress=False,
        )
    return found


def cost(guide: str, writes: int = 20) -> tuple[float, list[float], list[float]]:
    """The megabytes of a checkpoint of the image experiment at its published size, and the seconds of writing it.

    The seconds that passed, and those of the processor, which other work on the machine adds little to.
    """
    settings = {
        "architecture": "dense",
        "batch_size": 1000,
        "guide": guide,
        "hidden_dim": 256,
        "latent_dim": 64,
        "noise": "fixed",
        "num_train": 10_000,
        "protocol": "fair",
        "seed": 0,
        "steps": 50_000,
        "width": 256 if guide == "amortized" else None,
    }
    train = torch.rand(10_000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model, made = build(settings, train)
    batches = avi.minibatches(train, batch_size=1000)
    seconds, busy = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "training"

        def write(fit):
            begin, worked = time.perf_counter(), time.process_time()
            fit.save(path)
            seconds.append(time.perf_counter() - begin)
            busy.append(time.process_time() - worked)

        avi.fit(model, made, batches=batches, num_steps=writes, compile=False, callbacks=[write], progress=False)
        return path.stat().st_size / 1e6, seconds, busy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cost", action="store_true")
    chosen = parser.parse_args()
    if chosen.cost:
        for guide in ("constant", "amortized", "factorized"):
            megabytes, *times = cost(guide)
            passed, busy = (1e3 * statistics.median(seconds) for seconds in times)
            print(
                f"{guide}: {megabytes:.1f} MB, {passed:.0f} ms a write, {busy:.0f} of them of the processor (medians)"
            )
        return
    begin = time.monotonic()

    def tell(steps: int, memory: int, files: int) -> None:
        print(
            f"{steps:>8,} steps: {memory / 2**20:.1f} MiB, {files} files, {time.monotonic() - begin:.0f} s", flush=True
        )

    run(chosen.steps, compile=chosen.compile, every=chosen.every, told=tell)
    print(f"Python {platform.python_version()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
