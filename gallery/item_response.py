r"""Item response theory, the two-parameter logistic model: persons answer the items of a test.

.. math:: a_p \sim N(0, 1), \qquad d_i \sim N(0, 2^2), \quad s_i \sim \mathrm{LogNormal}(0, 0.5^2), \qquad
          y_{pi} \sim \mathrm{Bernoulli}(\mathrm{logit}^{-1}(s_i (a_p - d_i)))

Ability of a person, difficulty and discrimination of an item. Standardized tests are scored by it, and language models are
ranked by it. Lord, "Applications of Item Response Theory to Practical Testing Problems", 1980; for inference by encoders,
Wu, Davis, Domingue, Piech and Goodman, "Variational Item Response Theory", 2020, https://arxiv.org/abs/2002.00276.

Two plates are crossed, and both hold latents: the guides give factors of their own to persons and to items. The amortized
guide has one encoder that reads a person's row of answers and another that reads an item's column.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare, correlation

PLATES = ("persons", "items")


def data(num_rows: int = 400, num_items: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Answers ``[N, M]``, abilities ``[N, 1]`` and difficulties ``[M]``."""
    generator = torch.Generator().manual_seed(seed)
    ability = torch.randn(num_rows, 1, generator=generator)
    difficulty = 1.5 * torch.randn(num_items, generator=generator)
    discrimination = (0.5 * torch.randn(num_items, generator=generator)).exp()
    probs = (discrimination * (ability - difficulty)).sigmoid()
    return torch.bernoulli(probs, generator=generator), ability, difficulty


def model(answers):
    persons = pyro.plate("persons", answers.shape[0], dim=-2)
    items = pyro.plate("items", answers.shape[1], dim=-1)
    with persons:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with persons, items:
        pyro.sample("answer", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=answers)


def guides():
    return {
        "constant": avi.ConstantGuide(model, plate=PLATES),
        "amortized": avi.AmortizedGuide(model, plate=PLATES),
        "factorized": avi.FactorizedGuide(model, plate=PLATES),
    }


def run(*, num_rows: int = 400, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last columns are the correlations of the posterior means with the true values."""
    answers, ability, difficulty = data(num_rows)
    columns = {"ability": correlation("ability", ability), "difficulty": correlation("difficulty", difficulty)}
    return compare(
        guides(), answers, num_steps=num_steps, num_samples=num_samples, lr=0.03, encoder_lr=0.005, columns=columns
    )


if __name__ == "__main__":
    print(run())
