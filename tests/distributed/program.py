"""What every process of the test runs, started by ``torchrun``; its results go to a file of its own."""

import itertools
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset

import pyro_avi as avi
from tests.distributed.trainings import BATCH, GUIDES, SIZE, STEPS, X, build, outcome, train, without_noise


def batches(seed=1):
    return avi.minibatches(X, batch_size=BATCH, distributed=True, seed=seed)


def trainings(rank, noises, kinds=tuple(GUIDES), **options):
    """Each guide with or without noise; the processes begin with other values, which process 0 then gives all."""
    found = {}
    for kind, noise in itertools.product(kinds, noises):
        pair = build(kind, seed=rank)
        if "factorized" in kind:
            # Rows begin with what their process has.
            pair[1].load_state_dict(build(kind)[1].state_dict())
        taken = list(itertools.islice(batches(), STEPS))
        with without_noise(not noise):
            fit = train(*pair, batches=taken, distributed=True, **options)
        shape = None if "factorized" not in kind else tuple(pair[1].table.shape)
        avi.gather_tables(pair[1])
        found[kind, noise] = {"batches": taken, "held": shape, **outcome(*pair, fit)}
    return found


def error_of(call):
    """The class and message of an error."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def broken(rank, kind, at, what):
    """Batches with a fault in process 1."""
    for step, (x, index) in enumerate(batches()):
        if rank == 1 and step == at:
            if what == "raise":
                raise FileNotFoundError("no such shard")
            x = torch.full_like(x, torch.nan)
        yield x, index


def errors(rank):
    """What each process says where one of them, or both, cannot go on."""

    def run(kind="amortized", size=SIZE, **options):
        return train(*build(kind, size=size), distributed=True, **{"batches": batches(), **options})

    def loaded(kind, sampler):
        loader = DataLoader(rows, batch_size=4, sampler=sampler)
        taken = []
        fit = run(kind, batches=(taken.append(index) or (x, index) for _ in range(5) for x, index in loader))
        again = run(kind, batches=loader)
        return fit.steps, again.steps, torch.cat(taken[:3]).tolist()

    rows, own = TensorDataset(X, torch.arange(SIZE)), range(rank, SIZE, 2)

    def stops(fit):
        return rank == 1 and fit.steps == 4

    def fails(fit):
        if rank == 1 and fit.steps == 2:
            raise KeyError("callback")

    shorter = SIZE - 3 * rank
    same = avi.minibatches(X, batch_size=BATCH)
    return {
        "raise": error_of(lambda: run(batches=broken(rank, "amortized", 3, "raise"))),
        "raise at first": error_of(lambda: run(batches=broken(rank, "amortized", 0, "raise"))),
        "nan": error_of(lambda: run("factorized", batches=broken(rank, "factorized", 3, "nan"))),
        "nan at first": error_of(lambda: run(batches=broken(rank, "amortized", 0, "nan"))),
        "callback": error_of(lambda: run(callbacks=[fails])),
        "stop": run(callbacks=[stops]).steps,
        "sizes": error_of(
            lambda: run(size=shorter, batches=avi.minibatches(X[:shorter], batch_size=8, distributed=True))
        ),
        "steps": error_of(lambda: run(num_steps=STEPS + rank)),
        "same rows": error_of(lambda: run(batches=same)),
        "others' rows": error_of(lambda: run("factorized", batches=same)),
        "optimizer": error_of(lambda: run("factorized", optimizer=torch.optim.SGD)),
        "small batch": error_of(lambda: avi.minibatches(X, batch_size=1, distributed=True)),
        "few rows": error_of(lambda: avi.minibatches(X[:1], batch_size=2, distributed=True)),
        "goes on": run().steps,
        "loaders": [loaded("amortized", DistributedSampler(rows)), loaded("factorized", SubsetRandomSampler(own))],
    }


class Killed(Exception):
    """What stands for a signal that ends the program."""


def resumed(folder, rank):
    """A training without a stop, and one that ends while its processes write: process 1 has not, and is a step behind."""

    def dies(fit):
        if fit.steps == STEPS - 1:
            raise Killed

    def run(seed, **options):
        pair = build("factorized", seed=seed)
        return outcome(*pair, train(*pair, batches=batches(), distributed=True, **options))

    path = folder / "training"
    error_of(lambda: run(0, checkpoint=path, every=2, callbacks=[dies]))
    if rank == 1:
        before = folder / "training.1-of-2.before"
        before.replace(folder / "training.1-of-2")
    dist.barrier()
    whole, again = run(0), run(7, checkpoint=path, every=2)
    finished = run(9, checkpoint=path, every=2)
    if rank == 1:
        (folder / "training.1-of-2").unlink()
        (folder / "training.1-of-2.before").unlink()
    dist.barrier()
    return whole, again, finished, error_of(lambda: run(0, checkpoint=path, every=2))


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    # A test of compiled steps is not to compare eager ones.
    warnings.filterwarnings("error", "The training step is taken eagerly")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if what == "compiled":
        found = {"trainings": trainings(rank, (True,), ("amortized", "factorized"), compile=True)}
    else:
        found = {"trainings": trainings(rank, (True, False)), "errors": errors(rank), "resumed": resumed(folder, rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
