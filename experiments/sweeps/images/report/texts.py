"""The fixed words of the images report: what it is about, how its numbers are made, what its words mean."""

from collections.abc import Sequence

from experiments.reporting.statistics import SEEN

#: A guide is at a level when what it lacks is less than this share of the level's lead over the constant guide.
LEVEL_SHARE = 0.02

LEAD = (
    "One Bayesian decoder, three guides that differ in where a row's variational parameters come from: one set for all rows "
    "(constant), computed by an encoder of width k (A-VI), kept for every row (F-VI)."
)

METHOD = (
    "ELBO: the exact bound in nats a row, all normalizers included. The training ELBO contains the KL divergence of the "
    "decoder's weights, the test ELBO the local terms of the test rows alone.",
    "Protocols: published has one learning rate for all guides and a fixed number of steps. Fair tunes the rates of each "
    "guide's local part and of its globals on one grid, which widens while its edge wins, and trains in rounds, each as long "
    "as all before it, until the last half of the steps gains less than a stated share of all that training gained, or a "
    "stated most is reached.",
    "F-VI contains A-VI. Under the fair protocol its bound is, by seed, the best of its own start, of one from the outputs "
    "of the widest encoder, and of A-VI's own bounds. Races (time to a level, equal steps, equal seconds) are run from its "
    "own start.",
    "Test rows: the encoder computes their posteriors, the constant guide has one for all, F-VI's are refined with the "
    "decoder's posterior frozen, which no encoder is granted.",
    "Errors: se = sqrt(max(sd², mean of m²) / S) over S seeds with standard deviation sd and Monte Carlo errors m; with one "
    f"seed m alone. Gaps are taken seed by seed. A difference counts from {SEEN:g} standard errors on.",
    "Curves, and what is read off them (levels, times, bounds at equal steps and seconds), watch the first 500 training rows; "
    "other bounds are of all. At equal steps and seconds the highest bound so far counts. A-VI's level: its last point less "
    f"{LEVEL_SHARE:.0%} of its lead over the constant guide. A time to a level is that of the first evaluation there, a median "
    "over seeds; '>' where too few of them got there.",
    "Seconds are of training alone, synchronized with the device.",
)

GLOSSARY = {
    "row": "one observation, here an image.",
    "guide": "the approximate posterior q(theta, z): theta the decoder's weights, z the latents of each row.",
    "ELBO": "the evidence lower bound, higher is better.",
    "joint gap": "F-VI's ELBO minus a guide's, each trained together with theta.",
    "amortization gap": "what refining each row from the guide's output gains, theta's posterior frozen: a lower bound.",
    "MSE": "mean squared error a pixel of the reconstruction at the posterior means.",
    "mean image": "the mean of the training images, the best single prediction for all rows.",
    "noise scale": "standard deviation of a pixel, fixed at 1 or learned.",
}


def listed(items: Sequence[str]) -> str:
    """The items in a sentence.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"
