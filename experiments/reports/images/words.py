"""The fixed words of the images report: what it is about, how its numbers are made, what its words mean."""

from collections.abc import Sequence

from experiments.reports.images.cells import ELBO_SHARE, TOLERANCES
from experiments.summary import SEEN

LEAD = (
    "One Bayesian decoder, three guides that differ in one thing: where the variational parameters of a row come "
    "from. The constant guide has one set for all rows, A-VI computes them by an encoder of width k, F-VI keeps a "
    "set for every row. The claim to check: A-VI with k ≥ 64 reaches F-VI's ELBO and reconstruction error and is two "
    "to three times faster (Margossian and Blei, 2024)."
)

METHOD = (
    "Every ELBO is the exact bound in nats a row, with all normalizers, comparable with log p(x). The training ELBO "
    "is the whole bound divided by the number of rows, the KL divergence of the decoder's weights included; the test "
    "ELBO holds the local terms of the test rows alone.",
    "Held-out rows: an amortized guide computes their posteriors with its encoder and the constant guide has the "
    "same one for every row. F-VI has no parameters for them, so theirs are refined on the test rows with the "
    "decoder's posterior frozen, which no encoder is granted. Read F-VI's test ELBO as what its decoder allows, not "
    "as a prediction of equal cost.",
    "Protocols: published is one learning rate for all guides; fair tunes the learning rates of each guide's local "
    "part and of its globals on the same small grid with the same budget and a decaying schedule. The runs that this "
    "took are listed as tuning.",
    "Standard errors: se = sqrt(max(sd², mean of m²) / S) with S seeds, sd their standard deviation and m each "
    "seed's Monte Carlo error; sd contains m already, and the maximum keeps a chance agreement of few seeds from "
    "passing for precision. With one seed it is the Monte Carlo error alone. Gaps are taken seed by seed first. A "
    f"difference counts from {SEEN:g} standard errors on; with two or three seeds even that is weak evidence.",
    f"Levels: the ELBO level is the best guide's final ELBO less {ELBO_SHARE:.0%} of its lead over the constant "
    "guide's (means over seeds, best over both protocols); the train MSE tolerances "
    f"{' and '.join(f'{level:g}' for level in TOLERANCES)} are the published ones. Times are those of the first "
    "evaluation that meets the level; a seed that never does counts as later than its last step, and a median or "
    "ratio that rests on it is a bound.",
    "Seconds are training seconds, synchronized with the device, evaluations excluded. Cells that ran at the same "
    "time shared the machine, and so may others have: steps repeat exactly, seconds do not.",
)

GLOSSARY = {
    "row": "one observation x_n, here an image.",
    "local latent z, global latent theta": "one a row; shared by all rows: here the decoder's weights and biases.",
    "guide": "the approximate posterior q(theta, z); its inference function gives a row's variational parameters.",
    "constant": "the guide with the same variational parameters for all rows.",
    "A-VI": "amortized variational inference: an encoder of width k computes a row's variational parameters.",
    "F-VI": "factorized variational inference: every row has variational parameters of its own.",
    "ELBO": "the evidence lower bound, higher is better; loss = -ELBO.",
    "nats a row": "the bound, in units of natural logarithms, divided by the number of rows.",
    "joint gap": "F-VI's final ELBO minus a guide's, each trained together with theta, paired by seed.",
    "amortization gap": "what refining each row's parameters from the guide's output gains, theta's posterior frozen.",
    "generalization gap": "amortization gap on test rows minus that on training rows.",
    "se": "standard error; ± is one of them.",
    "MSE": "mean squared error a pixel of the reconstruction at the posterior means.",
    "mean image": "the mean of the training images, which is the best that one prediction for all rows can do.",
    "noise scale": "standard deviation of the Gaussian likelihood of a pixel: fixed at 1 or learned.",
    "cell, record": "what decides one run; its stored result.",
}


def listed(items: Sequence[str]) -> str:
    """The items in a sentence.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)
