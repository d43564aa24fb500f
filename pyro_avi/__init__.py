"""Amortized, factorized and constant variational inference for any Pyro model with a plate of rows."""

from pyro_avi import encoders, models
from pyro_avi.closing.distill import Distillation, distill
from pyro_avi.closing.refine import refine
from pyro_avi.densities.log_weights import LogWeights, log_weights
from pyro_avi.diagnostics.arviz_export import to_arviz
from pyro_avi.diagnostics.gap_results import Gaps
from pyro_avi.diagnostics.gaps import measure_gaps
from pyro_avi.diagnostics.posterior_predictive import posterior_predictive
from pyro_avi.diagnostics.results_by_row import results_by_row
from pyro_avi.diagnostics.sbc import sbc
from pyro_avi.diagnostics.sbc_results import Calibration, Coverage
from pyro_avi.diagnostics.validation import Validation
from pyro_avi.distributed.tables import gather_tables
from pyro_avi.elbos.doubly_reparameterized import DoublyReparameterizedELBO
from pyro_avi.elbos.enumerated import EnumeratedELBO
from pyro_avi.elbos.importance_weighted import ImportanceWeightedELBO
from pyro_avi.elbos.leave_one_out import LeaveOneOutELBO
from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.elbos.relaxed import RelaxedELBO
from pyro_avi.elbos.score_function import ScoreFunctionELBO
from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.elbos.vimco import VimcoELBO
from pyro_avi.encoder_inputs.window import Window
from pyro_avi.escalation.escalate import escalate
from pyro_avi.escalation.results import Escalation
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
from pyro_avi.gradients.results import EstimatorNoise, GradientVariance
from pyro_avi.gradients.variance import gradient_variance
from pyro_avi.guide_bases.mean_field import MeanFieldNormal
from pyro_avi.guides import AmortizedGuide, ConstantGuide, FactorizedGuide, SemiAmortizedGuide
from pyro_avi.rows.refinement import Refinement
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
    "Distillation",
    "DivergedError",
    "DoublyReparameterizedELBO",
    "EnumeratedELBO",
    "Escalation",
    "Estimate",
    "EstimatorNoise",
    "FactorizedGuide",
    "Family",
    "Fit",
    "Flow",
    "Gaps",
    "GradientVariance",
    "ImportanceWeightedELBO",
    "LeaveOneOutELBO",
    "LogWeights",
    "LowRankNormal",
    "MarkovNormal",
    "MeanFieldNormal",
    "MultivariateNormal",
    "RaoBlackwellizedELBO",
    "Refinement",
    "RelaxedELBO",
    "RowFlow",
    "ScoreFunctionELBO",
    "SemiAmortizedGuide",
    "StickingTheLandingELBO",
    "TailIndex",
    "Validation",
    "VimcoELBO",
    "Window",
    "ais",
    "amortizability",
    "distill",
    "elbo",
    "encoders",
    "escalate",
    "ess",
    "fit",
    "fit_many",
    "gather_tables",
    "gradient_variance",
    "iwelbo",
    "khat",
    "load",
    "log_weights",
    "measure_gaps",
    "minibatches",
    "models",
    "posterior_predictive",
    "refine",
    "results_by_row",
    "save",
    "sbc",
    "to_arviz",
]

__version__ = "0.1.0"
