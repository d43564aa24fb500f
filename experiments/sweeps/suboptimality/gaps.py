"""One cell of the sweep `suboptimality`: train a variational autoencoder, then measure its gaps at a fixed decoder."""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyro_avi as avi
from experiments.runner.run_cell import Context
from experiments.sweeps.suboptimality.training import RICHER, binary_images, build, train

__all__ = ["measure_cell"]

# Steps of refinement from the encoder's output (Kim et al. take 20), and draws to measure by.
_REFINEMENTS, _REFINEMENT_DRAWS = (1, 5, 20, 100), 20
# Seeds of draws that have to be independent.
_GAPS, _REFINE, _ANNEAL = 1, 2, 3
# Points of the curve of losses.
_POINTS = 50


def measure_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train as the settings say, and measure the gaps of the first training and test rows."""
    of_data = (settings["dataset"], settings["num_train"], settings["data_seed"], context.data_dir, context.download)
    rows = [part.to(context.device) for part in binary_images(*of_data)]
    torch.manual_seed(settings["seed"])
    model, guide = build(settings, rows[0])
    result = {
        "status": "diverged",
        "diverged_at": None,
        "parameters": {"encoder": _count(guide), "decoder": _count(model)},
        "loss": None,
        "train_seconds": None,
        "compile_seconds": None,
        "parts": None,
    }
    try:
        fit = train(model, guide, rows[0], settings, context)
    except avi.DivergedError as error:
        return result | {"diverged_at": error.step}
    # The last step may be the one too many.
    if not all(parameter.isfinite().all() for part in (model, guide) for parameter in part.parameters()):
        return result | {"diverged_at": settings["steps"]}
    parts = {}
    for name, x in zip(("train", "test"), rows, strict=True):
        context.progress(settings["steps"], settings["steps"], f"gaps of {name} rows")
        x = x[: settings["rows"]]
        parts[name] = context.scratch.once(f"gaps_{name}", partial(_measure, model, guide, x, settings))
        parts[name]["bounds"]["mean_image"] = _rounded(_mean_image(rows[0], x))
    return result | {
        "status": "done",
        "loss": _thinned(fit.losses / len(rows[0])),
        "train_seconds": fit.seconds,
        "compile_seconds": fit.compile_seconds,
        "parts": parts,
    }


def _measure(model, guide: avi.AmortizedGuide, x: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds by row in nats, what is to be known of their quality, and what they took."""
    richer = None if settings["richer"] is None else RICHER[settings["richer"]]()
    seed = 10 * settings["seed"]
    started = time.perf_counter()
    gaps = avi.measure_gaps(
        model,
        guide,
        x,
        num_samples=settings["num_samples"],
        num_steps=settings["refine_steps"],
        lr=settings["refine_lr"],
        max_rounds=settings["max_rounds"],
        richer=richer,
        seed=seed + _GAPS,
        progress=False,
    )
    of_gaps = time.perf_counter() - started
    best = gaps.elbo.rows + gaps.amortization.rows
    annealed = _anneal(model, guide, x[: settings["ais_rows"]], settings, seed + _ANNEAL)
    of_ais = time.perf_counter() - started - of_gaps
    return {
        "rows": len(x),
        # "iwae" is the evidence before annealing: the importance-weighted bound of the best factor.
        "bounds": {
            "elbo": _rounded(gaps.elbo.rows),
            "best": _rounded(best),
            "richer": None if gaps.richer is None else _rounded(best + gaps.richer.rows),
            "iwae": _rounded(gaps.evidence.rows),
            "ais": None if annealed is None else _rounded(annealed.rows),
        },
        # Of the means over rows, from the draws alone.
        "draws_se": {
            name: _finite(getattr(gaps, name).per_row.se) for name in ("elbo", "amortization", "approximation")
        },
        "not_converged": _positions(~gaps.converged),
        "unreliable": _positions(gaps.unreliable),
        "khat_above": int(gaps.khat.unreliable.sum()),
        "ess_median": _finite(gaps.khat.ess.median().item()),
        "refinement": _refine(model, guide, x, seed + _REFINE),
        "seconds": {"gaps": of_gaps, "ais": of_ais},
    }


def _mean_image(train: Tensor, x: Tensor) -> Tensor:
    """Log probabilities of rows by the training images' mean alone: what a model whose latents do nothing reaches."""
    odds = ((train.sum(0) + 0.5) / (len(train) + 1)).logit()
    return torch.distributions.Bernoulli(logits=odds).log_prob(x).flatten(1).sum(1)


def _anneal(model, guide, x: Tensor, settings: Mapping[str, Any], seed: int) -> avi.Estimate | None:
    """Annealed importance sampling from factors that refinement has brought near the best."""
    if not len(x):
        return None
    options = {"num_steps": settings["refine_steps"], "lr": settings["refine_lr"], "seed": seed, "progress": False}
    near = avi.refine(model, guide, x, **options)
    budget = {f"num_{name}": settings[f"ais_{name}"] for name in ("chains", "temperatures", "leapfrog")}
    return avi.ais(model, near, x, **budget, seed=seed, progress=False)


def _refine(model, guide, x: Tensor, seed: int) -> list[dict[str, Any]]:
    """What a number of steps from the encoder's output gains, in nats a row, and the seconds that they took."""
    before = _bounds(model, guide, x, seed)
    fit = []
    for steps in _REFINEMENTS:
        started = time.perf_counter()
        options = {"num_steps": steps, "seed": seed + 10, "progress": False}
        refined = avi.refine(model, guide, x, **options)
        seconds = time.perf_counter() - started
        # By the same draws, moved and stretched: most of their noise cancels in the difference.
        gain = _bounds(model, refined, x, seed) - before
        fit.append({"steps": steps, "gain": _rounded(gain), "seconds": seconds})
    return fit


def _bounds(model, guide, x: Tensor, seed: int) -> Tensor:
    return avi.log_weights(model, guide, x, num_samples=_REFINEMENT_DRAWS, seed=seed, progress=False).local.mean(0)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _thinned(losses: Tensor) -> dict[str, list]:
    """Means of equal numbers of steps, and the steps where these end."""
    blocks = losses.tensor_split(min(_POINTS, len(losses)))
    ends = torch.tensor([len(block) for block in blocks]).cumsum(0).tolist()
    return {"step": ends, "value": [round(block.mean().item(), 4) for block in blocks]}


def _positions(flags: Tensor) -> list[int]:
    return flags.nonzero().squeeze(-1).tolist()


def _rounded(values: Tensor) -> list[float | None]:
    """Thousandths of a nat: below the noise of any row."""
    return [round(value, 3) if math.isfinite(value) else None for value in values.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
