"""Everything stays on the device of the data. Torch's `meta` device, which knows shapes alone, stands in for any other."""

import ast
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.fx.experimental import _config

import pyro_avi as avi

ROOT = Path(__file__).parents[1]
GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": lambda model: avi.AmortizedGuide(model, encoder=(6,)),
    "factorized": avi.FactorizedGuide,
}
MODELS = {"local": avi.models.VAE, "local and global": avi.models.BayesianDecoder}
OPTIONS = {
    "num_steps": 2,
    "lr": {"local": lambda step: 0.1 / (step + 1), "global": 0.01},
    "clip_norm": 1.0,
    "progress": False,
}
# That two tensors have the same values cannot be asked here, so guides take them for unrelated.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("The rows", "What masks and scales", "Encountered")
]


@pytest.fixture
def device(monkeypatch):
    """Values that are asked for are made up."""
    monkeypatch.setattr("pyro_avi.inspection.inspect_model.equal", lambda one, two: True)
    monkeypatch.setattr("pyro_avi.diagnostics.gaps._check_bounded", lambda weights, whose: None)
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda one, two: one.is_meta or equal(one, two))
    monkeypatch.setattr(torch, "allclose", lambda one, two, **tolerances: True)
    for name, answer in {
        "item": lambda x: 1.0,
        "__int__": lambda x: 1,
        "__float__": lambda x: 1.0,
        "__bool__": lambda x: True,
        "any": lambda x: False,
        "all": lambda x: True,
        "tolist": lambda x: torch.zeros(x.shape).tolist(),
        "cpu": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    }.items():
        monkeypatch.setattr(torch.Tensor, name, _made_up(answer, getattr(torch.Tensor, name)))
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield torch.device("meta")


def _made_up(answer, known):
    """Along a dimension nothing is asked for yet."""
    return lambda x, *dims: answer(x) if x.is_meta and not dims else known(x, *dims)


@pytest.fixture
def traced(monkeypatch):
    """The graphs that steps are traced to, run as they are; where their inputs and what they make are."""
    places = []

    def compile_graph(graph, inputs, *, with_draws):
        made = [node.kwargs["device"] for node in graph.graph.nodes if node.kwargs.get("device") is not None]
        places.append({torch.device(one).type for one in [*made, *(x.device for x in inputs)]})
        assert not with_draws
        return graph.forward

    for user in ("compiled_step", "vmapped_step"):
        monkeypatch.setattr(f"pyro_avi.optimization.{user}.compile_graph", compile_graph)
    return places


def build(guide, model, device):
    decoder = avi.models.DenseDecoder(2, (5,), (1, 4, 4))
    model = MODELS[model](decoder, size=12, likelihood=avi.models.GaussianLikelihood(0.5, learned=True)).to(device)
    return model, GUIDES[guide](model)


def batches(device):
    x, index = torch.rand(12, 1, 4, 4, device=device), torch.arange(5, device=device)
    while True:
        yield x[:5], index


def places_of(*modules):
    return {parameter.device.type for module in modules for parameter in module.parameters()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("guide", GUIDES)
def test_training(guide, model, device, traced):
    pair = build(guide, model, device)
    # The eager step is taken too, for comparison.
    avi.fit(*pair, batches=batches(device), compile=True, elbo=Trace_ELBO(num_particles=2), **OPTIONS)
    assert places_of(*pair) == {"meta"} and traced == [{"meta"}]


@pytest.mark.parametrize("guide", GUIDES)
def test_training_at_once(guide, device, traced):
    pairs = [build(guide, "local and global", device) for _ in range(2)]
    of_each = [batches(device) for _ in pairs]
    avi.fit_many(pairs, batches=of_each, seed=[0, 1], elbo=TraceMeanField_ELBO(), **OPTIONS)
    assert places_of(*pairs[0], *pairs[1]) == {"meta"} and traced == [{"meta"}]


@pytest.mark.parametrize("guide", GUIDES)
def test_answers(guide, device):
    take_answers(guide, device)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_answers_on_cuda(guide):
    take_answers(guide, torch.device("cuda", 0))


def test_what_is_asked_of_cuda_is_there():
    """Without a device nothing else tells a misspelled name."""
    asked = set()
    for path in (path for room in ("pyro_avi", "experiments", "tests") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                asked.add(node.attr)
    assert {"synchronize", "CUDAGraph"} <= asked and [name for name in asked if not hasattr(torch.cuda, name)] == []


@pytest.mark.cuda
def test_verdicts_on_cuda():
    """Continuous and discrete latents: the verdict, and the numbers that may refute it."""

    def mixture(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(logits=torch.zeros(3).to(x)))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]).to(x)[kind], 0.5), obs=x)

    decoder, x = build("constant", "local", "cuda")[0], torch.rand(12, 1, 4, 4, device="cuda")
    for model, data in ((decoder, x), (mixture, x[:, 0, 0, 0])):
        verdict = avi.amortizability(model, data)
        assert verdict.possible and max(verdict.check(model, data).values()) < 1e-9


def take_answers(guide, device):
    model, guide = build(guide, "local", device)
    x, index = torch.rand(12, 1, 4, 4, device=device), torch.arange(12, device=device)
    guide.setup(x, index)
    weights = avi.log_weights(model, guide, x, index, num_samples=30)
    assert weights.local.device == device
    avi.elbo(weights), avi.iwelbo(weights), avi.khat(weights)
    assert avi.ess(weights).device == device
    assert places_of(avi.refine(model, guide, x, num_steps=2)) == {device.type}
    chains = {"num_chains": 25, "num_temperatures": 3, "num_leapfrog": 2}
    avi.measure_gaps(model, guide, x, index, num_samples=30, num_steps=2, max_rounds=1, annealing=chains)
