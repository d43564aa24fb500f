"""Pyro models with latents for each row, to compare guides on; some of them with exact answers.

Every model is a callable ``model(x=None, index=None)`` with a plate of ``size`` rows, ``"data"`` or, of a series, ``"time"``.
"""

from pyro_avi.models.bayesian_decoder import BayesianDecoder
from pyro_avi.models.decoders import ConvDecoder, DenseDecoder
from pyro_avi.models.factor_analysis import FactorAnalysis
from pyro_avi.models.gaussian_process import GaussianProcess
from pyro_avi.models.likelihoods import BernoulliLikelihood, GaussianLikelihood
from pyro_avi.models.linear_vae import LinearVAE
from pyro_avi.models.nonlinear1d import Nonlinear1d
from pyro_avi.models.normal_mixture import NormalMixture
from pyro_avi.models.normal_normal import NormalNormal
from pyro_avi.models.sigmoid_belief import SigmoidBelief
from pyro_avi.models.state_space import LinearGaussianStateSpace
from pyro_avi.models.vae import VAE

__all__ = [
    "VAE",
    "BayesianDecoder",
    "BernoulliLikelihood",
    "ConvDecoder",
    "DenseDecoder",
    "FactorAnalysis",
    "GaussianLikelihood",
    "GaussianProcess",
    "LinearGaussianStateSpace",
    "LinearVAE",
    "Nonlinear1d",
    "NormalMixture",
    "NormalNormal",
    "SigmoidBelief",
]
