"""Times compiled and eager trainings of many models, and says where ``compile="auto"`` takes the slower ones.

    python -m tests.optimization.break_even --out break_even.csv

Every model is trained in a process of its own, on one thread, with an empty compile cache. Times are processor times of the
process and of the compilers that it starts: until the first step is over, and of each later one, the median. What a training
of any number of steps takes follows from them, and is printed as a table. A file that is there is gone on with.
"""

import argparse
import csv
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi.compilation.cost import Work, count_work
from pyro_avi.optimization import step as steps
from pyro_avi.seeds import seeded

STEPS = (100, 300, 1_000, 3_000, 5_000, 10_000, 30_000)
#: Of the zoo, each with an amortized guide.
ZOO = ("eight_schools", "mixed_effects", "radon", "baseball", "logistic_growth", "gplvm")
#: Rows, rows of a batch, latents, layers of the decoder, pixels, and the guide with its encoder.
DECODERS = {
    "VAE, 200 rows of 4": (200, 20, 2, (4,), 4, avi.AmortizedGuide, (16,)),
    "VAE, digits": (1_797, 256, 8, (64, 64), 64, avi.AmortizedGuide, (16,)),
    "VAE, digits, F-VI": (1_797, 256, 8, (64, 64), 64, avi.FactorizedGuide, None),
    "VAE, images, 256 rows": (10_000, 256, 64, (256, 256), 784, avi.AmortizedGuide, (64,)),
    "VAE, images, 256 rows, F-VI": (10_000, 256, 64, (256, 256), 784, avi.FactorizedGuide, None),
    "VAE, images, 2,000 rows": (2_000, 2_000, 64, (256, 256), 784, avi.AmortizedGuide, (256,)),
}
# Processor seconds for the steps of each way.
PATIENCE = 1.5


class Clock:
    """Processor times at the end of every step; ends a training after so many seconds."""

    def __init__(self):
        self.began, self.times = self.now(), []

    @staticmethod
    def now():
        compilers = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + compilers.ru_utime + compilers.ru_stime

    def __call__(self, fit):
        self.times.append(self.now())
        return self.times[-1] - self.times[0] > PATIENCE

    def told(self):
        """Seconds until the first step is over, and of a later one."""
        lengths = [two - one for one, two in itertools.pairwise(self.times)]
        return self.times[0] - self.began, statistics.median(lengths)


def build(name):
    """Model, guide, arguments by step, and the loss."""
    torch.manual_seed(0)
    if name in ZOO:
        problem = importlib.import_module(f"gallery.zoo.{name}").problem()
        model = problem.make_model()
        inputs = {} if problem.inputs is None else {"inputs": problem.inputs}
        guide = avi.AmortizedGuide(model, **problem.options, **inputs)
        return model, guide, itertools.repeat(problem.args), problem.make_elbo()
    size, batch, latents, layers, pixels, guide, encoder = DECODERS[name]
    model = avi.models.VAE(avi.models.DenseDecoder(latents, layers, (pixels,)), size=size)
    guide = guide(model) if encoder is None else guide(model, encoder=encoder)
    batches = avi.minibatches(torch.rand(size, pixels).round(), batch_size=batch)
    return model, guide, batches, TraceMeanField_ELBO()


def measure(name):
    """What decides, and what it takes, of one model."""
    found = {"model": name}
    for way, compile in {"eager": False, "compiled": True}.items():
        model, guide, batches, elbo = build(name)
        clock = Clock()
        options = {"lr": 1e-3, "elbo": elbo, "callbacks": [clock], "progress": False}
        with warnings.catch_warnings():
            # Else eager steps are taken for compiled ones.
            warnings.filterwarnings("error", "The training step is taken eagerly")
            avi.fit(model, guide, batches=batches, num_steps=3_000, compile=compile, **options)
        found[f"{way} first s"], found[f"{way} step ms"] = clock.told()
        found[f"{way} step ms"] *= 1e3
    model, guide, batches, elbo = build(name)
    call = next(batches)
    options = steps.StepOptions(None, 1e-3, None, "float32", False)
    training = steps.TrainingStep(model, guide, elbo, options=options, num_steps=1, call=call, kwargs={})
    with seeded(0):
        work = count_work(training.gradient, call, {})
    return {**found, "operations": work.operations, "elements": work.elements}


def share(found, count):
    """Which way a training of so many steps takes, and what that takes as a share of the better one."""
    taken = {
        way: float(found[f"{way} first s"]) + (count - 1) * float(found[f"{way} step ms"]) / 1e3
        for way in ("eager", "compiled")
    }
    work = Work(int(found["operations"]), int(found["elements"]))
    chosen = "compiled" if work.is_worth_compiling(count, steps._COST_OF_COMPILING) else "eager"
    return chosen, taken[chosen] / min(taken.values())


def table(measured):
    """A line a model, in Markdown: by the number of steps the share of what is chosen, with a ``c`` where it is compiled."""
    heads = ["model", "eager ms", "compiled ms", "s to compile", *(f"{count:,}" for count in STEPS), "largest of all"]
    told = [f"| {' | '.join(heads)} |", f"| --- {'| ---: ' * (len(heads) - 1)}|"]
    for found in measured:
        numbers = [f"{float(found[f'{way} step ms']):.2f}" for way in ("eager", "compiled")]
        numbers.append(f"{float(found['compiled first s']) - float(found['eager first s']):.0f}")
        for chosen, ratio in (share(found, count) for count in STEPS):
            numbers.append(f"{ratio:.2f}{' c' if chosen == 'compiled' else ''}")
        # Between them, in steps of a fiftieth.
        counts = {round(1.02**power) for power in range(700)}
        most, at = max((share(found, count)[1], count) for count in counts)
        told.append(f"| {found['model']} | {' | '.join(numbers)} | {most:.2f} at {at:,} |")
    return "\n".join(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("break_even.csv"))
    parser.add_argument("--one", help="the model that this process measures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    measured = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    for name in [*ZOO, *DECODERS]:
        if name in {one["model"] for one in measured}:
            continue
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, "-m", "tests.optimization.break_even", "--one", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(name, done.stderr.strip().splitlines()[-1], file=sys.stderr)
            continue
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(measured[0]))
            writer.writeheader()
            writer.writerows(measured)
        print(name, flush=True)
    print(table(measured))


if __name__ == "__main__":
    main()
