r"""A Gaussian process latent variable model, from ``pyro.contrib.gp``, with the guide of that package.

.. math:: X_{nk} \sim N(0, 1), \qquad y_d \mid X \sim N(0, K(X, X) + \sigma^2 I)

Flowers of scikit-learn's iris data, standardized. Lawrence, "Gaussian Process Latent Variable Models for Visualisation of High
Dimensional Data", 2004. The package's model has no plate, and a flower's position bears on all others: to every guide all
latents are global.
"""

import torch
from pyro.contrib.gp.kernels import RBF
from pyro.contrib.gp.models import GPLVM, GPRegression
from pyro.infer.autoguide import init_to_value
from sklearn.datasets import load_iris

from gallery.zoo import Problem


def data():
    """Standardized measures ``[4, N]`` of every fifth flower."""
    y = torch.tensor(load_iris().data[::5], dtype=torch.float32)
    return ((y - y.mean(0)) / y.std(0)).T


def start(y):
    """Where the package's guide begins: the first two measures, ``[N, 2]``."""
    return y[:2].T.contiguous()


def make_model():
    y = data()
    base = GPRegression(start(y), y, RBF(input_dim=2, lengthscale=torch.ones(2)), noise=torch.tensor(0.1))
    return GPLVM(base).model


def problem() -> Problem:
    return Problem(
        origin="`pyro.contrib.gp`",
        rows=f"{data().shape[1]} flowers",
        make_model=make_model,
        args=(),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=600,
        lr=0.05,
        options={"init_loc_fn": init_to_value(values={"X": start(data())})},
    )
