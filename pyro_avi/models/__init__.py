"""Pyro models with a latent vector for each row, to compare guides on.

Every model is a callable ``model(x=None, index=None)`` with a plate ``"data"`` of ``size`` rows.
"""

from pyro_avi.models.bayesian_decoder import BayesianDecoder
from pyro_avi.models.decoders import ConvDecoder, DenseDecoder
from pyro_avi.models.likelihoods import BernoulliLikelihood, GaussianLikelihood
from pyro_avi.models.vae import VAE

__all__ = ["VAE", "BayesianDecoder", "BernoulliLikelihood", "ConvDecoder", "DenseDecoder", "GaussianLikelihood"]
