"""The three guides, by name, for tests that hold of each of them."""

import pyro_avi as avi

GUIDES = {"constant": avi.ConstantGuide, "amortized": avi.AmortizedGuide, "factorized": avi.FactorizedGuide}

# The same by their classes, with a small encoder.
SMALL_GUIDES = {
    "ConstantGuide": avi.ConstantGuide,
    "AmortizedGuide": lambda model, **options: avi.AmortizedGuide(model, **{"encoder": (4,), **options}),
    "FactorizedGuide": avi.FactorizedGuide,
}
