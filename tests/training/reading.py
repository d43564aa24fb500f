"""How much of a training goes into waiting for rows from the disk: `python -m tests.training.reading --rows 2000000`.

Batches of 256 rows anywhere in a file of floats, which the system has forgotten before each training: by `minibatches` of the
mapped file, taken for one that memory does not hold, and by a `DataLoader` with workers over it. A third training has its rows
in memory. Waiting is time by the clock: on a machine that others use, its least and its median over turns are what to read.
"""

import argparse
import gc
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_convert

import pyro_avi as avi
from pyro_avi.rows import mapped_file

SHAPE, WARM_UP = (1, 4, 4), 10


class Rows(Dataset):
    """Rows of an array on disk with their positions, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.x = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, index: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.x[index]), torch.tensor(index)


def bytes_read() -> int:
    """What this process has had read from disks so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


class Timed(Iterator):
    """Batches, and the seconds that each was waited for."""

    def __init__(self, batches: Iterator) -> None:
        self.batches, self.waited = batches, []

    def __next__(self):
        begin = time.perf_counter()
        batch = next(self.batches)
        self.waited.append(time.perf_counter() - begin)
        return batch


def forget(path: Path) -> None:
    """Have the system drop what it holds of a file in memory."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def batches_by(way: str, path: Path, workers: int) -> Iterator:
    """Batches of 256 rows."""
    if way != "loader":
        array = np.load(path, mmap_mode="r" if way == "minibatches" else None)
        yield from avi.minibatches(array, batch_size=256)
    loader = DataLoader(Rows(path), 256, shuffle=True, num_workers=workers, collate_fn=default_convert)
    while True:
        yield from map(tuple, loader)


def measure(batches: Iterator, size: int, steps: int) -> list[float]:
    """Of the steps, in seconds: medians of the wait for a batch and of all by the clock, the mean by the processor with all
    threads, the longest wait; and the share of all waits.
    """
    torch.manual_seed(0)
    model = avi.models.VAE(avi.models.DenseDecoder(8, (64,), SHAPE), size=size)
    timed, ends, processor = Timed(batches), [], []
    avi.fit(
        model,
        avi.AmortizedGuide(model),
        batches=timed,
        num_steps=steps + WARM_UP,
        callbacks=[lambda fit: ends.append(time.perf_counter()), lambda fit: processor.append(time.process_time())],
        compile=False,
        progress=False,
    )
    waited, steps_took = np.array(timed.waited[WARM_UP : WARM_UP + steps]), np.diff(ends)[WARM_UP - 1 :]
    # Threads take their share in some of the steps.
    processor_step = (processor[-1] - processor[WARM_UP - 1]) / steps
    return [np.median(waited), np.median(steps_took), processor_step, waited.max(), waited.sum() / steps_took.sum()]


def main() -> None:
    """The command line: a line of a table for each way, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args()
    # Read ahead in files of any length.
    mapped_file._SHARE = 0.0
    print("| rows by | wait, ms | step, ms | processor, ms | longest wait, ms | share of waiting | kB read a step |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        np.save(path, np.random.default_rng(0).random((chosen.rows, *SHAPE), np.float32))
        for _ in range(chosen.turns):
            for way in ("memory", "minibatches", "loader"):
                # What is mapped by one that nobody needs any more is not forgotten.
                gc.collect()
                forget(path)
                batches = batches_by(way, path, chosen.workers)
                # A loader forks its workers here, whose reading and processor time is not counted.
                before, first = bytes_read(), next(batches)
                wait, step, processor, longest, share = measure(
                    itertools.chain([first], batches), chosen.rows, chosen.steps
                )
                read = (bytes_read() - before) / chosen.steps / 1e3
                print(
                    f"| {way} | {1e3 * wait:.2f} | {1e3 * step:.2f} | {1e3 * processor:.2f} | {1e3 * longest:.1f} "
                    f"| {share:.3f} | {read:.0f} |",
                    flush=True,
                )
                batches.close()


if __name__ == "__main__":
    main()
