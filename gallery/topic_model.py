r"""A topic model, ProdLDA: what documents are about, from the words that they use.

.. math:: \theta_n \sim \mathrm{Dirichlet}(\alpha), \qquad
          x_n \mid \theta_n \sim \mathrm{Multinomial}(L_n, \mathrm{softmax}(\theta_n^\top \beta))

The topic of each word is summed out. Latent Dirichlet allocation (Blei, Ng, Jordan, 2003) mixes the topics' word
distributions; ProdLDA multiplies them, which gives sharper topics. Used to explore archives, reviews and abstracts.
Srivastava and Sutton, "Autoencoding Variational Inference for Topic Models", 2017, https://arxiv.org/abs/1703.01488.

The proportions of a document lie on a simplex, and the guides' normals are transported there. The topics are parameters of
the model, as in the paper. Training takes minibatches of documents with their positions.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_avi as avi
from gallery import Table, compare, correlation

NUM_TOPICS = 4


def data(num_rows: int = 500, num_words: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Word counts ``[N, V]`` of documents of 30 to 120 words, and their word probabilities ``[N, V]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        topics = 2.0 * torch.randn(NUM_TOPICS, num_words)
        proportions = dist.Dirichlet(0.5 * torch.ones(NUM_TOPICS)).sample((num_rows,))
        probs = (proportions @ topics).softmax(-1)
        lengths = torch.randint(30, 121, (num_rows,)).tolist()
        counts = [dist.Multinomial(length, p).sample() for length, p in zip(lengths, probs, strict=True)]
    return torch.stack(counts), probs


class ProdLDA(PyroModule):
    def __init__(self, num_documents, num_words, num_topics, longest=120):
        super().__init__()
        self.num_documents, self.num_topics, self.longest = num_documents, num_topics, longest
        self.topics = nn.Parameter(0.1 * torch.randn(num_topics, num_words))

    def forward(self, counts, index=None):
        size = len(counts) if index is None else self.num_documents
        with pyro.plate("documents", size, subsample=index):
            proportions = pyro.sample("proportions", dist.Dirichlet(0.5 * torch.ones(self.num_topics)))
            probs = pyro.deterministic("probs", (proportions @ self.topics).softmax(-1), event_dim=1)
            pyro.sample("counts", dist.Multinomial(self.longest, probs), obs=counts)


def frequencies(counts, index=None):
    return counts.sqrt()


def guides(num_documents, num_words):
    def model():
        torch.manual_seed(0)
        return ProdLDA(num_documents, num_words, NUM_TOPICS)

    return {
        "constant": avi.ConstantGuide(model()),
        "amortized": avi.AmortizedGuide(model(), inputs=frequencies),
        "factorized": avi.FactorizedGuide(model()),
    }


def run(*, num_rows: int = 500, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of the word probabilities with the true ones."""
    counts, probs = data(num_rows)
    columns = {"correlation": correlation("probs", probs)}
    options = {"lr": 0.05, "encoder_lr": 0.01, "batch_size": 100, "columns": columns}
    return compare(guides(*counts.shape), counts, num_steps=num_steps, num_samples=num_samples, **options)


if __name__ == "__main__":
    print(run())
