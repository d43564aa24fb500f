"""A sweep that costs nothing, for the tests of the machinery. Its cells misbehave on request.

`--kinds` gives one cell a word. What a cell did is appended to the file `log` of the data folder, one line an event;
cells that wait go on when the file `go` appears there.
"""

import logging
import os
import random
import signal
import time
from pathlib import Path

from experiments.runner.cell import Cell

summary = "numbers, for tests"

KINDS = ("plain", "fail", "die", "orphan", "wait", "write", "threads", "nan", "eager", "pyro")
KINDS += ("memory", "huge", "diverge", "exit", "short", "once", "demand", "images", "read")


def add_arguments(parser):
    parser.add_argument("--kinds", default="plain,plain,plain", help="one word a cell")
    parser.add_argument("--tuned", action="store_true", help="a first cell decides the settings of the others")


def plan(options, records):
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"Unknown kinds {sorted(unknown)}. Expected some of {KINDS}.")
    if not options.tuned:
        return [Cell("tiny", {"kind": kind, "seed": seed}) for seed, kind in enumerate(kinds)]
    first = Cell("tiny", {"kind": "plain", "seed": -1})
    if first.key not in records:
        return [first]
    rate = records[first.key]["result"]["value"]
    return [first, *(Cell("tiny", {"kind": kind, "seed": seed, "rate": rate}) for seed, kind in enumerate(kinds))]


def count(options):
    return len(options.kinds.split(",")) + options.tuned


def describe(cell):
    return f"tiny {cell.settings['kind']} seed {cell.settings['seed']}"


def estimate(cell, *, device):
    return 10.0


def demands(cell, *, device):
    return {"num_cpus": 2} if cell.settings["kind"] == "demand" else {}


def run(settings, context):
    folder = Path(context.data_dir)
    log(folder, "start", settings)
    context.progress(1, 2, "half way")
    go = folder / "go"
    match settings["kind"]:
        case "fail":
            raise RuntimeError("this cell always fails")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "orphan":
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for(go)
            os._exit(0)
        case "wait":
            wait_for(go)
        case "write" if not go.exists():
            hold_writes(folder, settings)
        case "short":
            time.sleep(0.2)
        case "once" if not go.exists():
            go.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "demand":
            import ray

            return {"value": ray.get_runtime_context().get_assigned_resources()}
        case "memory":
            raise MemoryError("no memory for this cell")
        case "huge":
            import torch

            torch.empty(1 << 50)
        case "images":
            from experiments import datasets

            log(folder, "end", settings)
            return {"value": datasets.load("mnist", data_dir=context.data_dir).train.sum().item()}
        case "read":
            return {"value": read(context.data_dir)}
        case "diverge":
            raise FloatingPointError("the loss is not finite at step 3")
        case "exit":
            raise SystemExit(3)
        case "threads":
            import torch

            return {"value": torch.get_num_threads()}
        case "eager":
            log_graph("The step", "no compiler today")
        case "pyro":
            return {"value": pyro_program(folder, settings["seed"])}
        case "nan":
            return {"value": float("nan")}
    log(folder, "end", settings)
    return {"value": random.Random(settings["seed"]).random(), "curve": (1, 2.5, None)}


def log_graph(what, fallback):
    """As the library tells of a step that was to be compiled; it takes seconds to import."""
    message = f"{what} is evaluated eagerly, not compiled: {fallback}."
    logging.getLogger("pyro_avi").info(message, extra={"what": what, "fallback": fallback})


def pyro_program(folder, seed):
    """What a cell sets in its process, looked at when another such cell has set it too, or when the file `go` is there."""
    import pyro
    import torch

    torch.manual_seed(seed)
    pyro.clear_param_store()
    pyro.param("seed", torch.tensor(float(seed)))
    with pyro.poutine.trace() as trace:
        log(folder, "set", {"seed": seed})
        deadline = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline:
            if (folder / "log").read_text().count("set ") >= 2:
                break
            time.sleep(0.01)
        value = pyro.sample("draw", pyro.distributions.Normal(0.0, 1.0)).item()
    return [pyro.param("seed", torch.tensor(-1.0)).item(), value, sorted(trace.trace.nodes)]


def read(folder):
    """The sum of a data set that counts how often it is read."""
    from experiments import datasets

    own = str(Path(__file__).parents[1] / "own_datasets")
    if own not in datasets.__path__:
        datasets.__path__.append(own)
    return datasets.load("counted", data_dir=folder).train.sum().item()


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def log(folder, event, settings):
    with open(folder / "log", "a") as file:
        file.write(f"{event} {settings['seed']} {os.getpid()}\n")


def hold_writes(folder, settings):
    """From now on this process stops in the middle of a write: the content is there, the name is not."""

    def replace(source, target):
        log(folder, "writing", settings)
        time.sleep(600)

    os.replace = replace
