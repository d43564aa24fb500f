"""Model and guide as Pyro programs: the library's `fit` and `fit_many`, and Pyro's `SVI`."""

import itertools

import pyro
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from experiments.sweeps.speed.implementations.workload import LR, Workload
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["fit", "fit_five", "svi"]


def fit(workload: Workload, rounds: Rounds, **options) -> None:
    """A step of `fit` with these options."""
    model, guide = workload.model_and_guide()
    calls = workload.calls()
    # A full batch needs no positions.
    if workload.batch == workload.size:
        calls = itertools.repeat((workload.x,))
    avi.fit(
        model,
        guide,
        batches=calls,
        num_steps=1_000_000,
        lr=LR,
        elbo=TraceMeanField_ELBO(),
        progress=False,
        callbacks=[rounds],
        **options,
    )


def fit_five(workload: Workload, rounds: Rounds) -> None:
    """A step of five models and guides at once."""
    batches = [workload.calls(seed) for seed in range(5)]
    avi.fit_many(
        [workload.model_and_guide() for _ in batches],
        batches=batches,
        num_steps=1_000_000,
        lr=LR,
        elbo=TraceMeanField_ELBO(),
        seed=list(range(5)),
        progress=False,
        callbacks=[rounds],
    )


def svi(workload: Workload, rounds: Rounds) -> None:
    """A step of Pyro's SVI, as people write it."""
    model, guide = workload.model_and_guide()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    calls = workload.calls()
    guide.setup(*next(calls))
    with pyro.validation_enabled(False):
        rounds.run(lambda: svi.step(*next(calls)))
