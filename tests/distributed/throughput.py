"""Times a step of one model in one process and in several, in turns.

    torchrun --nproc-per-node=2 -m tests.distributed.throughput

Process 0 also takes the steps with whole batches alone, while the others wait. Printed are medians over rounds: rows a second,
and the processor time that a step takes in process 0.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from pyro.infer import Trace_ELBO

import pyro_avi as avi
from pyro_avi.distributed.ranks import Ranks
from pyro_avi.optimization.step import StepOptions, TrainingStep
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import draws_from

ROWS, LATENTS, HIDDEN = 10_000, 64, 256
GUIDES = {"amortized": avi.AmortizedGuide, "factorized": avi.FactorizedGuide}


class Steps:
    """Steps of one way of training, one after another."""

    def __init__(self, kind, x, batch_size, compile, distributed):
        self._ranks = Ranks(distributed)
        torch.manual_seed(0)
        decoder = avi.models.DenseDecoder(LATENTS, (HIDDEN, HIDDEN), (1, 28, 28))
        model = avi.models.VAE(decoder, size=len(x), likelihood=avi.models.GaussianLikelihood(0.3, learned=True))
        guide = GUIDES[kind](model)
        if kind == "factorized" and not self._ranks.alone:
            guide.hold_shard(self._ranks.shard)
        self._batches = avi.minibatches(x, batch_size=batch_size, distributed=distributed)
        call = next(self._batches)
        options = StepOptions(None, 1e-3, None, "float32", compile)
        ranks = None if self._ranks.alone else self._ranks
        self._step = TrainingStep(
            model, guide, Trace_ELBO(), options=options, num_steps=10, call=call, kwargs={}, ranks=ranks
        )
        self.take(3)

    def take(self, count):
        """The wall time and the processor time of a step, in seconds."""
        began = time.perf_counter(), time.process_time()
        for step in range(count):
            with self._ranks.step(step, self._step.gradient.parameters):
                self._step.step(step, next(self._batches), {})
        return (time.perf_counter() - began[0]) / count, (time.process_time() - began[1]) / count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    # A group of process 0 alone takes the path of many, without another one to wait for.
    only_first = dist.new_group([0])
    x = torch.rand(ROWS, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    if rank == 0:
        print("| guide | batch | processes | rows a second | processor ms a step of process 0 |")
        print("| --- | ---: | --- | ---: | ---: |")
    for kind in options.guides:
        for batch_size in options.batch_sizes:
            groups = {"1": False, "1, as one of many": only_first, str(count): True}
            with isolated_param_store(), draws_from(rank):
                ways = {}
                for name, group in groups.items():
                    dist.barrier()
                    if rank == 0 or group is True:
                        ways[name] = Steps(kind, x, batch_size, options.compile, group)
                times = {name: [] for name in groups}
                for _ in range(options.rounds):
                    for name in groups:
                        dist.barrier()
                        if name in ways:
                            times[name].append(ways[name].take(options.steps))
            for name, taken in times.items() if rank == 0 else ():
                wall, processor = (statistics.median(each) for each in zip(*taken, strict=True))
                print(
                    f"| {kind} | {batch_size} | {name} | {batch_size / wall:,.0f} | {1e3 * processor:.1f} |", flush=True
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
