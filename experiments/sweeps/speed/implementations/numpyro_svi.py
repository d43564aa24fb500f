"""The step in NumPyro, many of them in one compiled loop."""

import itertools
from collections.abc import Callable

from experiments.sweeps.speed.implementations.workload import LR, Workload
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["svi"]


def svi(workload: Workload, rounds: Rounds, *, precision: str = "float32") -> int | None:
    """NumPyro's SVI in rounds of steps; the most memory of the device in bytes, where JAX tells.

    Args:
        workload, rounds: as for every implementation.
        precision: of matrix products, by JAX's names. Left to itself JAX rounds to TF32 on devices that can.
    """
    # An extra of its own installs it.
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    from numpyro.infer import SVI, TraceMeanField_ELBO

    jax.config.update("jax_default_matmul_precision", precision)
    # An error where JAX has no such device, instead of another one.
    place = jax.devices(workload.device)[0]
    jax.config.update("jax_default_device", place)
    w, x = workload, jnp.asarray(workload.x.cpu().numpy())
    key = jax.random.PRNGKey(0)
    svi = SVI(*_programs(workload), numpyro.optim.Adam(LR), TraceMeanField_ELBO())
    generator = np.random.default_rng(0)

    @jax.jit
    def many(state, batches):
        def step(state, index):
            rows = x if w.batch == w.size else x[index]
            return svi.update(state, rows, index)

        return jax.lax.scan(step, state, batches)

    def draw(count: int):
        if w.batch == w.size:
            return jnp.broadcast_to(jnp.arange(w.size), (count, w.size))
        # A permutation an epoch, as for the others: one a step would take as long as a small step.
        each = w.size // w.batch
        epochs = [generator.permutation(w.size)[: each * w.batch] for _ in range(-(-count // each))]
        return jnp.asarray(np.concatenate(epochs).reshape(-1, w.batch)[:count])

    state = svi.init(key, x[: w.batch], jnp.arange(w.batch))

    def steps(count: int) -> None:
        nonlocal state
        state, losses = many(state, draw(count))
        losses.block_until_ready()

    rounds.run_many(steps)
    return (place.memory_stats() or {}).get("peak_bytes_in_use")


def _programs(workload: Workload) -> tuple[Callable, Callable]:
    """Model and guide."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as ndist

    w = workload
    shapes = [shape for i, o in itertools.pairwise(w.widths) for shape in ((i, o), (o,))]
    counts = [int(np.prod(shape)) for shape in shapes]
    total, ends = sum(counts), list(itertools.accumulate(counts))[:-1]
    key = jax.random.PRNGKey(0)

    def model(x, index):
        theta = numpyro.sample("theta", ndist.Normal(jnp.zeros(total), 1.0).to_event(1))
        with numpyro.plate("data", w.size, subsample_size=len(x)):
            hidden = numpyro.sample("z", ndist.Normal(jnp.zeros(w.latent_dim), 1.0).to_event(1))
            weights = [part.reshape(shape) for part, shape in zip(jnp.split(theta, ends), shapes, strict=True)]
            for i in range(0, len(weights), 2):
                hidden = hidden @ weights[i] + weights[i + 1]
                hidden = jax.nn.leaky_relu(hidden) if i + 2 < len(weights) else hidden
            numpyro.sample("x", ndist.Normal(hidden, 1.0).to_event(1), obs=x)

    def guide(x, index):
        loc = numpyro.param("loc", 0.05 * jax.random.normal(key, (total,)))
        numpyro.sample(
            "theta", ndist.Normal(loc, jnp.exp(numpyro.param("log_scale", jnp.full(total, -2.0)))).to_event(1)
        )
        double = 2 * w.latent_dim
        if w.kind == "amortized":
            first = numpyro.param("first", 0.03 * jax.random.normal(key, (w.num_pixels, w.width)))
            head = numpyro.param("head", jnp.zeros((w.width, double)))
            hidden = jax.nn.silu(x @ first + numpyro.param("first_bias", jnp.zeros(w.width)))
            parameters = hidden @ head + numpyro.param("head_bias", jnp.zeros(double))
        elif w.kind == "factorized":
            table = numpyro.param("table", jnp.zeros((w.size, double)))
            parameters = table if w.batch == w.size else table[index]
        else:
            parameters = jnp.broadcast_to(numpyro.param("vector", jnp.zeros(double)), (len(x), double))
        loc, log_scale = jnp.split(parameters, 2, -1)
        with numpyro.plate("data", w.size, subsample_size=len(x)):
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide
