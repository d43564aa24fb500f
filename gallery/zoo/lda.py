r"""Latent Dirichlet allocation with every word's topic summed out by enumeration.

.. math:: \beta_k \sim \mathrm{Dirichlet}(0.2), \quad \theta_n \sim \mathrm{Dirichlet}(0.5), \qquad
          t_{nw} \sim \mathrm{Categorical}(\theta_n), \quad x_{nw} \sim \mathrm{Categorical}(\beta_{t_{nw}})

Blei, Ng and Jordan, "Latent Dirichlet Allocation", 2003; after Pyro's example ``lda``. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_TOPICS, NUM_WORDS, NUM_DOCUMENTS, LENGTH = 3, 16, 40, 30


def data():
    """Words ``[L, N]``, one of the vocabulary each."""
    with seeded():
        topics = dist.Dirichlet(0.2 * torch.ones(NUM_WORDS)).sample((NUM_TOPICS,))
        proportions = dist.Dirichlet(0.5 * torch.ones(NUM_TOPICS)).sample((NUM_DOCUMENTS,))
        return dist.Categorical(proportions @ topics).sample((LENGTH,))


def model(words):
    with pyro.plate("topics", NUM_TOPICS):
        topics = pyro.sample("topic", dist.Dirichlet(0.2 * torch.ones(NUM_WORDS)))
    with pyro.plate("documents", words.shape[1]):
        proportions = pyro.sample("proportions", dist.Dirichlet(0.5 * torch.ones(NUM_TOPICS)))
        with pyro.plate("words", words.shape[0]):
            topic = pyro.sample("word_topic", dist.Categorical(proportions), infer={"enumerate": "parallel"})
            pyro.sample("word", dist.Categorical(topics[topic]), obs=words)


def problem() -> Problem:
    return Problem(
        origin="example `lda`",
        rows=f"{NUM_DOCUMENTS} documents",
        make_model=lambda: model,
        args=(data(),),
        pyro_guide="AutoNormal",
        make_pyro_guide=lambda model: AutoNormal(poutine.block(model, hide=["word_topic"])),
        num_steps=600,
        lr=0.05,
        make_elbo=lambda: TraceEnum_ELBO(max_plate_nesting=2),
    )
