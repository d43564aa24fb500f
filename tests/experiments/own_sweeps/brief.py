"""Short trainings of an autoencoder on the digits, to time what runs them. `--cells` says how many, `--steps` how long each."""

import time

from experiments.runner.cell import Cell

summary = "short trainings, to time engines"


def add_arguments(parser):
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100)


def plan(options, records):
    return [Cell("brief", {"seed": seed, "steps": options.steps}) for seed in range(options.cells)]


def count(options):
    return options.cells


def describe(cell):
    return f"brief seed {cell.settings['seed']}"


def estimate(cell, *, device):
    return 0.01 * cell.settings["steps"]


def run(settings, context):
    # What it takes itself, the imports of the first cell of a process among it, and not what a worker does beside it.
    begin = time.thread_time()
    loss = train(settings, context)
    return {"loss": loss, "seconds": time.thread_time() - begin}


def train(settings, context):
    import torch
    from pyro.infer import TraceMeanField_ELBO

    import pyro_avi as avi
    from experiments import datasets

    x = datasets.load("digits", data_dir=context.data_dir).train
    torch.manual_seed(settings["seed"])
    decoder = avi.models.DenseDecoder(5, (64,), x.shape[1:])
    model = avi.models.VAE(decoder, size=len(x), likelihood=avi.models.BernoulliLikelihood())
    guide = avi.AmortizedGuide(model, encoder=(64,))
    steps = settings["steps"]
    fit = avi.fit(
        model,
        guide,
        batches=avi.minibatches(x.round(), batch_size=100, seed=settings["seed"]),
        num_steps=steps,
        lr=1e-3,
        elbo=TraceMeanField_ELBO(),
        progress=False,
        compile=False,
        callbacks=[lambda fit: context.progress(fit.steps, steps, "training")],
        seed=settings["seed"],
    )
    return fit.losses[-10:].mean().item()
