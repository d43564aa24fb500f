"""Amortized, factorized and constant variational inference for any Pyro model with a plate of rows."""

from pyro_avi import encoders, models
from pyro_avi.closing.refine import refine
from pyro_avi.densities.log_weights import LogWeights, log_weights
from pyro_avi.diagnostics.arviz_export import to_arviz
from pyro_avi.diagnostics.gap_results import Gaps
from pyro_avi.diagnostics.gaps import measure_gaps
from pyro_avi.diagnostics.posterior_predictive import posterior_predictive
from pyro_avi.diagnostics.sbc import sbc
from pyro_avi.diagnostics.sbc_results import Calibration, Coverage
from pyro_avi.diagnostics.validation import Validation
from pyro_avi.distributed.tables import gather_tables
from pyro_avi.encoder_inputs.window import Window
from pyro_avi.estimators import Estimate, TailIndex, elbo, ess, iwelbo, khat
from pyro_avi.evidence.ais import ais
from pyro_avi.families import (
    Conditional,
    DiagonalNormal,
    Family,
    Flow,
    LowRankNormal,
    MarkovNormal,
    MultivariateNormal,
    RowFlow,
)
from pyro_avi.guide_bases.mean_field import MeanFieldNormal
from pyro_avi.guides import AmortizedGuide, ConstantGuide, FactorizedGuide
from pyro_avi.optimization.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.storage import load, save
from pyro_avi.sufficiency.amortizability import amortizability
from pyro_avi.sufficiency.verdict import Amortizability
from pyro_avi.training.fit import fit
from pyro_avi.training.fit_many import fit_many
from pyro_avi.training.loop import DivergedError, Fit
from pyro_avi.training.minibatches import minibatches

__all__ = [
    "Amortizability",
    "AmortizedGuide",
    "Calibration",
    "Conditional",
    "ConstantGuide",
    "Coverage",
    "DiagonalNormal",
    "DivergedError",
    "Estimate",
    "FactorizedGuide",
    "Family",
    "Fit",
    "Flow",
    "Gaps",
    "LogWeights",
    "LowRankNormal",
    "MarkovNormal",
    "MeanFieldNormal",
    "MultivariateNormal",
    "RowFlow",
    "StickingTheLandingELBO",
    "TailIndex",
    "Validation",
    "Window",
    "ais",
    "amortizability",
    "elbo",
    "encoders",
    "ess",
    "fit",
    "fit_many",
    "gather_tables",
    "iwelbo",
    "khat",
    "load",
    "log_weights",
    "measure_gaps",
    "minibatches",
    "models",
    "posterior_predictive",
    "refine",
    "save",
    "sbc",
    "to_arviz",
]

__version__ = "0.1.0"
