"""Records as the images sweep writes them, with numbers that are known."""

import numpy as np

from experiments.runner.cell import Cell
from experiments.runner.record import FORMAT

GUIDES = (("constant", None), ("amortized", 1), ("amortized", 64), ("amortized", 256), ("factorized", None))
SEEDS = (1954, 1789, 1790)
#: Final training ELBO, steps it takes to settle, train MSE, amortization gap: what a plausible run of each guide gives.
TRUTH = {
    ("constant", None): (-690.0, 100, 0.0675, 60.0),
    ("amortized", 1): (-520.0, 400, 0.052, 30.0),
    ("amortized", 64): (-242.0, 700, 0.011, 4.0),
    ("amortized", 256): (-238.0, 600, 0.0108, 2.0),
    ("factorized", None): (-232.0, 1500, 0.0105, None),
    # Started from A-VI k=256, at whose bound its curve begins.
    ("continued", 256): (-231.0, 300, None, None),
}
MEAN_IMAGE = {"mnist": (0.0675, 0.0680), "fashionmnist": (0.0868, 0.0873)}
#: Seconds a step; steps taken of the stated most, in settling times; seeds differ by less than .3 nats.
SECONDS = {"constant": 0.004, "amortized": 0.006, "factorized": 0.008, "continued": 0.008}
SETTLED, MOST, SHARE, FALL = 8, 40_000, 0.02, 900.0
RATES = {"published": (1e-3, 1e-3), "fair": (1e-2, 1e-3)}


def make_settings(**changes):
    """The settings of a result cell: published or fair by `protocol`; `changes` go before what follows from it."""
    fair = changes["protocol"] == "fair"
    local, shared = RATES[changes["protocol"]]
    settings = {
        "purpose": "result", "dataset": "mnist", "num_train": 10000, "data_seed": 0, "batch_size": 1000, "latent_dim": 64,
        "hidden_dim": 256, "noise": "learned", "architecture": "dense", "compile": "auto", "width": None,
        "steps": MOST if fair else 1000, "share": SHARE if fair else None, "lr_local": local, "lr_global": shared,
        "continued": None,
    }  # fmt: skip
    if fair and changes["guide"] == "amortized" and changes["width"] == 256:
        settings["continued"] = {"lr_local": 0.03, "lr_global": 1e-3}
    return settings | changes


def make_curve(guide, steps, final, settle, fall, mse):
    """A bound that rises by `fall` to `final`: what is left of it shrinks as exp(-step / settle)."""
    at = np.unique(np.concatenate([[0], np.geomspace(1, steps, 25).round(), np.linspace(0, steps, 16).round()])).astype(
        int
    )
    left = np.exp(-at / settle)
    mse = None if mse is None else (mse + 0.1 * left).tolist()
    return {
        "step": at.tolist(), "seconds": (SECONDS[guide] * at).tolist(), "elbo": (final - fall * left).tolist(),
        "elbo_se": [0.05] * len(at), "train_mse": mse or [None] * len(at),
        "test_mse": [None] * len(at) if guide in ("factorized", "continued") else mse,
    }  # fmt: skip


def make_convergence(curve, share):
    """What `curve` gained in its last half, and whether that is less than `share` of its rise."""
    steps = curve["step"][-1]
    late, seconds = (
        curve[name][-1] - np.interp(0.5 * steps, curve["step"], curve[name]) for name in ("elbo", "seconds")
    )
    rise = curve["elbo"][-1] - curve["elbo"][0]
    return {
        "converged": bool(late < share * rise), "steps": steps, "late_gain": late, "late_seconds": seconds,
        "rise": rise, "share": share,
    }  # fmt: skip


def make_record(settings, *, elbo=None, steps=None, settle=None, status="done", started="2026-01-05T10:00:00+00:00"):
    """A record of these settings. `elbo` overrides the final training ELBO before its seed's share, `steps` those taken."""
    guide, width, fair = settings["guide"], settings["width"], settings["protocol"] == "fair"
    truth, slowness, mse, gap = TRUTH[guide, width]
    settle = settle or slowness
    mean_train, mean_test = MEAN_IMAGE.get(settings["dataset"], MEAN_IMAGE["mnist"])
    mse *= mean_train / MEAN_IMAGE["mnist"][0]
    steps = steps or (min(settings["steps"], SETTLED * settle) if fair else settings["steps"])
    final = (truth if elbo is None else elbo) + shift(settings)
    curve = make_curve(guide, steps, final, settle, FALL, mse)
    source = {"constant": "same for every row", "amortized": "encoder", "factorized": "refined, globals frozen"}
    refined = None if gap is None else {
        rows: {"elbo": final + gap * scale, "elbo_se": 0.1, "rows": 500, "gain": gap * scale, "gain_se": 0.05}
        for rows, scale in (("train", 1.0), ("test", 1.3))
    }  # fmt: skip
    picture = np.clip(np.hypot(*np.mgrid[-1:1:8j, -1:1:8j]), 0, 1).ravel()
    result = {
        "status": status, "diverged_at": None, "curve": curve,
        "final": {
            rows: {"elbo": curve["elbo"][-1] - less, "elbo_se": 0.05, "mse": curve["train_mse"][-1], "rows": 10000}
            for rows, less in (("train", 0), ("test", 3))
        },
        "refined": refined, "convergence": make_convergence(curve, SHARE),
        "continued": make_continued(settings, curve["elbo"][-1]) if settings["continued"] else None,
        "parameters": {"local": 1000 * (width or 1), "global": 567840, "model": 1},
        "noise_scale": 0.11, "train_seconds": curve["seconds"][-1], "evaluation_seconds": 2.0,
        "mean_image_mse": {"train": mean_train, "test": mean_test},
        "images": {
            "shape": [1, 8, 8], "originals": [(picture * k / 5).tolist() for k in range(1, 6)],
            "reconstructions": [(picture * k / 5 * 0.9 + mse).tolist() for k in range(1, 6)],
        },
    }  # fmt: skip
    result["final"]["test"]["source"] = source[guide]
    if status == "diverged":
        result |= dict.fromkeys(("refined", "images", "final", "convergence", "continued")) | {"diverged_at": 400}
        result["curve"] = {name: values[:12] for name, values in curve.items()}
    return {
        "format": FORMAT, "sweep": "images", "key": Cell("images", settings).key, "settings": settings, "result": result,
        "provenance": make_provenance(started),
    }  # fmt: skip


def shift(settings):
    """What a seed adds to every bound of a guide: differences of guides are those of TRUTH up to .1."""
    return 0.3 * (SEEDS.index(settings["seed"]) - 1 if settings["seed"] in SEEDS else 0) + 1e-4 * (
        settings["width"] or 0
    )


def make_continued(settings, begin):
    """F-VI that goes on from a bound `begin` of the encoder; never below it."""
    final, settle, *_ = TRUTH["continued", 256]
    final = max(final + shift(settings), begin)
    curve = make_curve("continued", SETTLED * settle, final, settle, final - begin, None)
    return {
        "train_seconds": curve["seconds"][-1], "curve": curve, "status": "done", "diverged_at": None,
        "final": {"train": {"elbo": curve["elbo"][-1], "elbo_se": 0.05, "mse": 0.0101, "rows": 10000}},
        "convergence": make_convergence(curve, SHARE),
    }  # fmt: skip


def make_provenance(started):
    return {
        "started": started, "seconds": 30.0, "command": "python -m experiments.sweep images", "commit": "0123abc",
        "dirty": False, "versions": {"python": "3.11", "torch": "2.13.0"},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2}, "threads": 1,
        "device": "cpu", "device_name": "cpu", "peak_memory_bytes": 4 * 2**28, "compiled": [], "fallbacks": [],
    }  # fmt: skip


def make_tuning(settings, *, rates=(1e-3, 1e-2, 1e-1)):
    """A tuning record with a trial at each of these rates of the local part."""
    kept = {name: value for name, value in settings.items() if not name.startswith("lr_") and name != "continued"}
    kept |= {"purpose": "tuning", "seed": 20_000, "steps": 200, "grid": [[rate, 1e-3] for rate in rates]}
    trials = [
        {"lr_local": rate, "lr_global": 1e-3, "diverged_at": None, "elbo": -300.0 - rate, "elbo_se": 0.1}
        for rate in rates
    ]
    result = {"trials": trials, "train_seconds": 2.5, "evaluation_seconds": 0.5}
    return {
        "format": FORMAT, "sweep": "images", "key": Cell("images", kept).key, "settings": kept, "result": result,
        "provenance": make_provenance("2026-01-05T09:00:00+00:00"),
    }  # fmt: skip


def make_records(*, datasets=("mnist",), protocols=("published", "fair"), guides=GUIDES, seeds=SEEDS, **changes):
    """Records by key: results of every combination, and a tuning of each guide of the fair protocol."""
    found = []
    for dataset in datasets:
        for protocol in protocols:
            for guide, width in guides:
                here = {"dataset": dataset, "guide": guide, "width": width, "protocol": protocol} | changes
                found += [make_record(make_settings(seed=seed, **here)) for seed in seeds]
                if protocol == "fair":
                    found.append(make_tuning(make_settings(seed=0, **here)))
    return {record["key"]: record for record in found}


def results_of(records, **chosen):
    """The results among them whose settings are the chosen ones."""
    found = [record for record in records.values() if record["settings"]["purpose"] == "result"]
    return [r for r in found if all(r["settings"][name] == value for name, value in chosen.items())]


def replaced(records, *, seeds=SEEDS, how, **settings):
    """The records with those of these settings made again, `how` going to `make_record`."""
    again = [make_record(make_settings(seed=seed, **settings), **how) for seed in seeds]
    assert all(record["key"] in records for record in again)
    return records | {record["key"]: record for record in again}
