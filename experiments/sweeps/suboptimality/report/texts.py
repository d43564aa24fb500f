"""The fixed words of the suboptimality report: what it is about, how its numbers are made, what its words mean."""

from experiments.reporting.statistics import SEEN

LEAD = (
    "A variational autoencoder loses evidence twice: its family may not hold the posterior, and its encoder may not find "
    "the family's best member. The claim to check: the second loss is as large as the first or larger, shrinks with "
    "the encoder's size, and grows on test rows (Cremer, Li and Duvenaud, 2018)."
)

METHOD = (
    "Images are made binary once: every pixel is drawn with its grey value as the probability, from a seed. MNIST has a "
    "published binary version (Larochelle) that is another draw.",
    "Training: Adam with the published rate, 1e-3 times 10^(-i/7) during 3^i of 3,280 epochs, i = 0 to 7, stretched to the "
    "steps given; the weight of the KL divergence rises linearly from 0 to 1 at the start. ELU units.",
    "The decoder is then fixed. L[q] is the guide's bound, L[q*] that of the best factor of its family for each row, found "
    "by Adam from the encoder's output, from the mean of the outputs and from a standard normal, in rounds until one gains "
    "less than a hundredth of a nat; L[q**] the same in a richer family. Bounds are measured by fresh draws, common to all.",
    "The evidence is the importance-weighted bound of the best factor, by row. Of the first rows it is annealed too. Where "
    "annealing is the better bound in the mean of these rows, its lead there is added to the mean over all rows: "
    "log p = mean of all rows (IWAE) + max(0, mean of annealed rows (AIS - IWAE)). A maximum row by row would add the "
    "noise of the chains. Both are bounds from below, so the approximation gap is one too.",
    "Standard errors speak of other rows and other seeds: se = sqrt(var_n m_n / R + var_s m_s / S), m_n the mean of a row "
    "over S seeds, m_s that of a seed over R rows. With one seed the second term is unknown and left out: a comparison of "
    "two trainings of one seed each says nothing of the luck of the seed. Differences are taken row by row first. "
    f"One counts from {SEEN:g} standard errors on.",
    "Refinement: Adam on every row's parameters from the encoder's output, decoder fixed, learning rate 0.01, "
    "the mean of the second half of the steps taken. Seconds are those of the call, model and guide run eagerly or "
    "compiled as the library decides; cells that ran at the same time shared the machine.",
)

GLOSSARY = {
    "small, wide, conv": "the encoder: two layers as wide as the decoder's, two wider ones, two convolutions and a layer.",
    "diagonal, full, flow": "the family: normals with independent latents, with any covariance, normalizing flows.",
    "L[q], ELBO": "the evidence lower bound of q, higher is better.",
    "q, q*, q**": "the guide's factor of a row; the best one of its family; the best one of a richer family.",
    "inference gap": "log p(x) - L[q] = approximation gap + amortization gap.",
    "approximation gap": "log p(x) - L[q*].",
    "amortization gap": "L[q*] - L[q].",
    "IWAE, AIS": "importance-weighted bound; annealed importance sampling.",
    "not converged": "rows whose best factor still improved when the rounds were over.",
    "unreliable": "rows whose importance weights have too heavy a tail (k-hat) for their number.",
    "nats a row": "units of natural logarithms, the mean over rows.",
    "se": "standard error; ± is one of them.",
}
