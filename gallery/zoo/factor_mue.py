r"""Sequences of different lengths: ``FactorMuE`` of ``pyro.contrib.mue``, with the guide of that package.

A principal component analysis of a latent sequence, observed through insertions, deletions and substitutions, which a hidden
Markov model sums out. Weinstein and Marks, "A Structured Observation Distribution for Generative Biological Sequence
Prediction and Forecasting", 2021. The sequences are simulated, one-hot ``[N, L, 4]`` and padded with zeros.
"""

import torch
from pyro.contrib.mue.models import FactorMuE
from pyro.infer.autoguide import init_to_sample

from gallery.zoo import Problem, seeded

NUM_SEQUENCES, LENGTH = 30, 8


def data():
    """Sequences ``[N, L, 4]`` of two families, each letter changed with probability 0.1 and some ends cut off."""
    with seeded():
        families = torch.randint(4, (2, LENGTH))
        letters = families[torch.randint(2, (NUM_SEQUENCES,))]
        letters = letters.where(torch.rand(letters.shape) > 0.1, torch.randint(4, letters.shape))
        kept = torch.arange(LENGTH) < torch.randint(LENGTH - 2, LENGTH + 1, (NUM_SEQUENCES, 1))
        return torch.nn.functional.one_hot(letters, 4).float() * kept.unsqueeze(-1)


def problem() -> Problem:
    one = torch.tensor(1.0)
    return Problem(
        origin="`pyro.contrib.mue`",
        rows=f"{NUM_SEQUENCES} sequences",
        make_model=lambda: (
            FactorMuE(LENGTH, 4, 2, latent_seq_length=LENGTH, indel_prior_bias=4.0, inverse_temp_prior=1.0).model
        ),
        args=(data(), one, one),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=400,
        lr=0.03,
        # At the default, zeros, factors and positions are at a saddle point; the guide by hand starts at random, too.
        options={"init_loc_fn": init_to_sample},
    )
