"""The work of a cell of the sweep `scale`: a guide is trained on rows of a large plate, and watched."""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_avi as avi
from experiments.runner.run_cell import Context

__all__ = ["measure"]

_KINDS = {"constant": avi.ConstantGuide, "amortized": avi.AmortizedGuide, "factorized": avi.FactorizedGuide}
# Steps that are not counted: the first ones set things up.
_WARM_UP = 5


def measure(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train on rows that were never moved, again on the same rows, and on disk once more when memory has none of them."""
    torch.manual_seed(settings["seed"])
    with ExitStack() as stack:
        # Where large files are kept is the user's choice: TMPDIR.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        side = int(settings["numbers"] ** 0.5)
        decoder = avi.models.DenseDecoder(settings["latents"], (64,), (1, side, side))
        model = avi.models.VAE(decoder, size=settings["size"])
        guide = _guide(settings, model, folder)
        before, started = _status(), time.perf_counter()
        guide.setup(*next(_batches(settings, 1)))
        result: dict[str, Any] = {"setup_seconds": time.perf_counter() - started}
        on_disk = settings["guide"] == "factorized on disk"
        runs = ["first", "again"] + ["cold"] * on_disk
        for done, name in enumerate(runs, 1):
            if name == "cold":
                # What is mapped is not forgotten.
                del guide
                gc.collect()
                result |= _forget(folder)
                guide = _guide(settings, model, folder)
            read = _status().get("read_bytes")
            result |= _train(name, model, guide, settings)
            after = _status()
            if read is not None and on_disk:
                result[f"{name}_read_bytes"] = (after["read_bytes"] - read) / settings["steps"]
            context.progress(done, len(runs), f"{result[f'{name}_ms']:.3g} ms a step")
        tables = getattr(guide, "row_tables", dict)().values()
        parameters = sum(x.numel() for module in (model, guide) for x in module.parameters())
        files = [file.stat().st_size for file in folder.iterdir()]
        return result | {
            "shared_parameters": parameters - sum(x.numel() for x in tables),
            "row_parameters": sum(x.shape[1] for x in tables),
            "file_bytes": sum(files),
            "anonymous_bytes": after.get("RssAnon"),
            "anonymous_growth": after["RssAnon"] - before["RssAnon"] if "RssAnon" in after else None,
            "resident_bytes": after.get("VmRSS"),
        }


def _guide(settings: Mapping[str, Any], model, folder: Path):
    if settings["guide"] == "factorized on disk":
        return avi.FactorizedGuide(model, rows_on="disk", rows_path=folder)
    return _KINDS[settings["guide"]](model)


def _batches(settings: Mapping[str, Any], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows anywhere in the plate, with data of their own: what is measured is the guide."""
    generator = torch.Generator().manual_seed(seed)
    side = int(settings["numbers"] ** 0.5)
    while True:
        x = torch.rand(settings["batch"], 1, side, side, generator=generator)
        yield x, torch.randint(settings["size"], (settings["batch"],), generator=generator)


def _train(name: str, model, guide, settings: Mapping[str, Any]) -> dict[str, float]:
    """The median of a step's time, and of its processor time, in milliseconds."""
    clocks: list[tuple[float, float]] = []

    def read_clocks(fit: avi.Fit) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    avi.fit(
        model,
        guide,
        batches=_batches(settings, settings["seed"]),
        num_steps=settings["steps"] + _WARM_UP,
        compile=False,
        callbacks=[read_clocks],
        keep=False,
        progress=False,
    )
    steps = zip(clocks[_WARM_UP:], clocks[_WARM_UP - 1 :], strict=False)
    wall, processor = zip(*((new[0] - old[0], new[1] - old[1]) for new, old in steps), strict=True)
    return {f"{name}_ms": 1e3 * statistics.median(wall), f"{name}_processor_ms": 1e3 * statistics.median(processor)}


def _forget(folder: Path) -> dict[str, float]:
    """Write the files back and have the system forget their pages; how long the first took."""
    started = time.perf_counter()
    files = [os.open(file, os.O_RDWR) for file in folder.iterdir()]
    for file in files:
        os.fsync(file)
    seconds = time.perf_counter() - started
    for file in files:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return {"write_back_seconds": seconds}


def _status() -> dict[str, int]:
    """Bytes of memory and of reads from the disk, as Linux counts them."""
    found: dict[str, int] = {}
    for file, unit in (("status", 1024), ("io", 1)):
        try:
            lines = Path(f"/proc/self/{file}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmRSS", "read_bytes"):
                found[name] = int(value.split()[0]) * unit
    return found
