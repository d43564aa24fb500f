"""Implementations of one training step: by the library, by hand, by Pyro, by NumPyro, and its matrix products alone.

Each trains the same model by the same guide, by Adam, with closed-form divergences, except for Pyro's SVI, which is taken as
people write it. There is no JitTrace_ELBO among them: torch.jit cannot trace a decoder whose weights are given to it
(``torch.func.functional_call``).
"""

from collections.abc import Callable
from functools import partial

from experiments.sweeps.speed.implementations import by_hand, numpyro_svi, pyro_programs
from experiments.sweeps.speed.implementations.workload import Workload
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["IMPLEMENTATIONS", "Workload"]

#: By the name that settings have for it, a function that takes steps on a workload until there are no more turns. What it
#: returns, if anything, is the most memory that it took, in bytes, of which torch knows nothing.
IMPLEMENTATIONS: dict[str, Callable[[Workload, Rounds], int | None]] = {
    "compiled": partial(pyro_programs.fit, compile=True),
    "tf32": partial(pyro_programs.fit, compile=True, precision="tf32"),
    "bfloat16": partial(pyro_programs.fit, compile=True, precision="bfloat16"),
    "five at once": pyro_programs.fit_five,
    "eager": partial(pyro_programs.fit, compile=False),
    "hand": partial(by_hand.by_hand, compiled=False),
    "hand graph": by_hand.captured,
    "hand compiled": partial(by_hand.by_hand, compiled=True),
    "svi": pyro_programs.svi,
    "numpyro": numpyro_svi.svi,
    "numpyro tf32": partial(numpyro_svi.svi, precision="tensorfloat32"),
    "products": by_hand.products,
}
