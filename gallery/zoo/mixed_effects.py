r"""A linear model with fixed and random effects, ``lmer_model`` of ``pyro.contrib.oed.glmm``.

.. math:: w \sim N(0, I), \quad G^{-2} \sim \mathrm{Gamma}(\alpha, \beta), \quad u_g \sim N(0, G^2), \qquad
          y = X [w, u] + \epsilon

The package's model has no plate and takes its data by ``pyro.condition``: to every guide all latents are global.
Data are simulated.
"""

import pyro
import torch
from pyro.contrib.oed.glmm import lmer_model
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_GROUPS, NUM_OBSERVATIONS = 8, 60


def data():
    """The design ``[M, 2 + G]``, covariates beside indicators of the group, and the outcome ``[M]``."""
    with seeded():
        group = torch.randint(NUM_GROUPS, (NUM_OBSERVATIONS,))
        x = torch.randn(NUM_OBSERVATIONS, 2)
        effects = torch.randn(NUM_GROUPS)
        y = x @ torch.tensor([1.0, -1.0]) + effects[group] + torch.randn(NUM_OBSERVATIONS)
        return torch.cat([x, torch.nn.functional.one_hot(group, NUM_GROUPS).float()], -1), y


def problem() -> Problem:
    design, y = data()
    two, three = torch.tensor([2.0]), torch.tensor([3.0])
    model = lmer_model(torch.ones(2), NUM_GROUPS, three, two)
    return Problem(
        origin="`pyro.contrib.oed.glmm`",
        rows=f"{NUM_GROUPS} groups",
        make_model=lambda: pyro.condition(model, data={"y": y}),
        args=(design,),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
    )
