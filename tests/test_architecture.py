"""Who may import whom, what the package exports, and that importing it does nothing else.

The rules are those of the architecture page of the documentation. They are read from the syntax trees of the files, so
that an import inside a function or under ``TYPE_CHECKING`` counts like any other. `test_a_violation_is_found` breaks
each of them in a small tree of its own.
"""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TENSORS = frozenset({"torch", "pyro"})
FOUNDATION = frozenset(
    {"errors", "data_errors", "masks", "positions", "structure", "provenance", "parameters", "families", "encoders"}
)


@dataclass(frozen=True)
class Rule:
    """What a part of the library may import: its other parts, and packages beyond the standard library."""

    parts: frozenset[str] = frozenset()
    packages: frozenset[str] = TENSORS


RULES = {
    "turns": Rule(packages=frozenset()),
    "parameters": Rule(frozenset({"turns"})),
    "seeds": Rule(packages=frozenset({"torch"})),
    "errors": Rule(packages=frozenset()),
    "data_errors": Rule(frozenset({"errors"}), frozenset({"torch"})),
    "masks": Rule(),
    "evaluation": Rule(packages=frozenset({"torch"})),
    "positions": Rule(packages=frozenset({"torch"})),
    "supports": Rule(),
    "structure": Rule(frozenset({"data_errors", "evaluation", "masks", "parameters", "seeds", "supports"})),
    "replay": Rule(packages=frozenset({"torch"})),
    "one_run": Rule(frozenset({"data_errors", "masks", "positions", "structure", "replay"})),
    "provenance": Rule(frozenset({"masks", "one_run", "positions", "structure", "replay"})),
    "families": Rule(packages=TENSORS | {"zuko"}),
    "encoders": Rule(),
    "models": Rule(frozenset({"errors", "positions"})),
    "batches": Rule(packages=frozenset({"torch", "numpy"})),
    "guides": Rule(FOUNDATION | {"replay"}),
    "adam": Rule(packages=frozenset({"torch"})),
    "precision": Rule(packages=frozenset({"torch"})),
    "gradient": Rule(frozenset({"adam", "precision"})),
    "lifting": Rule(packages=frozenset({"torch"})),
    "captured": Rule(packages=frozenset({"torch"})),
    "sticking_the_landing": Rule(),
    "graphs": Rule(frozenset({"sticking_the_landing"})),
    "compiled": Rule(
        frozenset({"parameters", "adam", "captured", "gradient", "graphs", "lifting", "precision", "seeds"})
    ),
    "losses": Rule(frozenset({"parameters", "seeds"})),
    "options": Rule(frozenset({"losses", "precision"})),
    "steps": Rule(frozenset({"parameters", "adam", "gradient", "graphs", "compiled", "losses", "seeds"})),
    "divergence": Rule(frozenset({"gradient", "seeds"})),
    "training_state": Rule(frozenset({"steps"})),
    "files": Rule(packages=frozenset({"torch", "safetensors"})),
    "checkpoint": Rule(frozenset({"files", "training_state"}), frozenset({"torch"})),
    "training": Rule(
        frozenset({"checkpoint", "course", "data_errors", "divergence", "seeds", "steps", "training_state"})
    ),
    "fingerprint": Rule(packages=frozenset({"torch"})),
    "many_steps": Rule(frozenset({"captured", "compiled", "graphs", "gradient", "precision", "seeds", "steps"})),
    "course_figure": Rule(frozenset({"figures"}), frozenset({"numpy"})),
    "course": Rule(frozenset({"course_figure", "formatting"}), frozenset({"torch", "numpy", "tqdm"})),
    "loaders": Rule(frozenset({"positions", "seeds", "steps"}), frozenset({"torch"})),
    "fit": Rule(frozenset({"checkpoint", "course", "loaders", "options", "parameters", "seeds", "steps", "training"})),
    "fit_many": Rule(
        frozenset({"course", "fit", "graphs", "loaders", "many_steps", "options", "parameters", "seeds", "steps"})
    ),
    "dependence": Rule(packages=frozenset({"torch"})),
    "log_factors": Rule(frozenset({"structure"})),
    "perturbation": Rule(frozenset({"dependence", "log_factors", "structure"})),
    "attribution": Rule(frozenset({"dependence", "log_factors", "perturbation", "structure"}), TENSORS | {"scipy"}),
    "row_densities": Rule(frozenset({"attribution", "data_errors", "log_factors", "structure"})),
    "weights": Rule(
        frozenset({"structure", "parameters", "evaluation", "attribution", "log_factors", "perturbation"})
        | {"data_errors", "formatting"}
    ),
    "estimators": Rule(frozenset({"formatting"}), frozenset({"torch", "numpy", "scipy"})),
    "fused": Rule(frozenset({"graphs", "lifting"}), frozenset({"torch"})),
    "joint": Rule(frozenset({"structure", "parameters", "row_densities", "weights", "fused", "graphs"})),
    "one_row": Rule(frozenset({"structure", "guides"})),
    "conditional": Rule(frozenset({"structure", "parameters", "guides", "one_row"})),
    "annealed": Rule(
        frozenset(
            {"turns", "parameters", "seeds", "evaluation", "guides", "weights", "estimators", "joint", "conditional"}
        )
    ),
    "evidence": Rule(frozenset({"weights", "estimators"})),
    "enumerated": Rule(frozenset({"structure", "guides"})),
    "mixture": Rule(frozenset({"weights", "joint"})),
    "judge": Rule(frozenset({"structure", "guides", "weights", "row_densities", "joint", "annealed"})),
    "convergence": Rule(frozenset({"guides", "joint", "annealed"})),
    "search": Rule(
        frozenset({"guides", "weights", "estimators", "annealed", "judge", "mixture", "convergence", "refine"})
    ),
    "arviz_import": Rule(packages=frozenset({"arviz"})),
    "validation": Rule(frozenset({"course", "formatting", "parameters", "seeds", "weights"})),
    "predictive": Rule(frozenset({"turns", "structure", "log_factors"})),
    "export": Rule(frozenset({"arviz_import", "turns", "predictive", "seeds", "structure", "weights"})),
    "figures": Rule(packages=frozenset({"matplotlib"})),
    "formatting": Rule(packages=frozenset()),
    "tables": Rule(packages=frozenset()),
    "gap_figure": Rule(frozenset({"figures"}), frozenset({"torch", "numpy", "matplotlib"})),
    "gap_results": Rule(
        frozenset({"estimators", "formatting", "gap_figure", "tables"}), frozenset({"torch", "pandas"})
    ),
    "gaps": Rule(
        FOUNDATION
        | {
            "evaluation",
            "turns",
            "guides",
            "weights",
            "estimators",
            "refine",
            "joint",
            "conditional",
            "annealed",
            "evidence",
            "gap_results",
        }
        | {"judge", "mixture", "search"}
    ),
    "simulated": Rule(frozenset({"masks", "structure", "row_densities"})),
    "calibration_figure": Rule(frozenset({"figures"}), frozenset({"torch", "numpy", "scipy"})),
    "calibration_results": Rule(
        frozenset({"arviz_import", "estimators", "calibration_figure", "formatting", "tables"}),
        frozenset({"torch", "pandas"}),
    ),
    "calibration": Rule(
        frozenset({"turns", "structure", "guides", "estimators", "annealed", "conditional", "refine", "simulated"})
        | {"calibration_results"},
        frozenset({"torch"}),
    ),
    "storage": Rule(frozenset({"files", "fingerprint", "encoders", "families", "guides"}), frozenset({"torch"})),
    "refine": Rule(
        FOUNDATION
        | {
            "turns",
            "evaluation",
            "course",
            "sticking_the_landing",
            "guides",
            "models",
            "fit",
            "judge",
            "one_row",
            "enumerated",
            "estimators",
        }
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``from module import name``, or ``import module`` with an empty name."""

    file: Path
    line: int
    module: str
    name: str
    inside_function: bool

    def __str__(self) -> str:
        statement = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{self.file.as_posix()}:{self.line}: {statement}"

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def part(self) -> str:
        """Of an import of ``pyro_avi``: which part of it."""
        return [*self.module.split("."), self.name][1]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_below(node: ast.AST, file: Path, inside: bool = False) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(file, node.lineno, alias.name, "", inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        # One leading dot is the file's own folder, each further one the folder above.
        base = file.parts[: len(file.parts) - node.level] if node.level else ()
        module = ".".join([*base, *filter(None, [node.module])])
        yield from (Import(file, node.lineno, module, alias.name, inside) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        literal = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value
        if literal and not literal.startswith("."):
            yield Import(file, node.lineno, literal, "", inside)
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports_below(child, file, inside)


def imports(root: Path, folder: str) -> Iterator[Import]:
    """All imports of the Python files under ``root / folder``, relative ones resolved."""
    for path in sorted((root / folder).rglob("*.py")):
        yield from imports_below(parse(path), path.relative_to(root))


def exported(path: Path) -> set[str]:
    """The names in the literal ``__all__`` of a file."""
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def library_violations(root: Path) -> Iterator[str]:
    """Imports that the table of rules does not allow, and files that it does not know."""
    for path in sorted((root / "pyro_avi").rglob("*.py")):
        file = path.relative_to(root)
        importer = file.parts[1].removesuffix(".py")
        if importer == "__init__":
            rule = Rule(frozenset(RULES), frozenset())
        elif importer in RULES:
            rule = RULES[importer]
        else:
            yield f"{file.as_posix()}: no rule says what it may import"
            continue
        for found in imports_below(parse(path), file):
            if found.package == "pyro_avi" and found.part not in rule.parts | {importer}:
                yield f"{found}: of the library {importer} may import {sorted(rule.parts) or 'nothing'}"
            elif found.package not in rule.packages | sys.stdlib_module_names | {"pyro_avi"}:
                yield f"{found}: beyond the standard library {importer} may import {sorted(rule.packages)}"


def import_time_violations(root: Path) -> Iterator[str]:
    """Statements of the package's ``__init__`` other than its docstring, imports and literal dunder names."""
    for node in parse(root / "pyro_avi" / "__init__.py").body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and re.fullmatch(r"__\w+__", ast.unparse(node.targets[0]))
        if not (docstring or dunder or isinstance(node, ast.ImportFrom)):
            yield f"pyro_avi/__init__.py:{node.lineno}: importing the package does nothing but import its parts"


def public_names_violations(root: Path) -> Iterator[str]:
    """Uses of ``pyro_avi`` in the experiments and the gallery beyond its public names."""
    folders = {"pyro_avi": "pyro_avi", "pyro_avi.models": "pyro_avi/models", "pyro_avi.encoders": "pyro_avi/encoders"}
    public = {module: exported(root / folder / "__init__.py") for module, folder in folders.items()}
    public["pyro_avi"] |= {"models", "encoders"}
    for path in sorted(path for folder in ("experiments", "gallery") for path in (root / folder).rglob("*.py")):
        tree, file = parse(path), path.relative_to(root)
        for found in imports_below(tree, file):
            named = found.module in public and found.name in public[found.module] | {""}
            if found.package == "pyro_avi" and not named:
                yield f"{found}: {file.parts[0]} may import the public names of pyro_avi"
        local = {"pyro_avi": "pyro_avi"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                local |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                head, dot, rest = ast.unparse(node.value).partition(".")
                module = local.get(head, "") + dot + rest
                if module in public and node.attr not in public[module]:
                    yield f"{file.as_posix()}:{node.lineno}: {ast.unparse(node)} is not a public name of pyro_avi"


def gallery_violations(root: Path) -> Iterator[str]:
    """Imports of the gallery beyond what a Pyro program and the digits need."""
    known = TENSORS | sys.stdlib_module_names | {"gallery", "pyro_avi", "sklearn"}
    yield from (
        f"{found}: the gallery may not import it" for found in imports(root, "gallery") if found.package not in known
    )


def torchvision_violations(root: Path) -> Iterator[str]:
    """Imports of torchvision anywhere but inside a function of ``experiments/datasets``."""
    for folder in ("pyro_avi", "experiments", "gallery", "tests"):
        for found in imports(root, folder):
            downloads = found.file.parts[:2] == ("experiments", "datasets") and found.inside_function
            if found.package == "torchvision" and not downloads:
                yield f"{found}: torchvision is imported inside a function of experiments/datasets alone"


def dependency_violations(root: Path) -> Iterator[str]:
    """Imports of packages that ``setup.cfg`` does not ask for."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    required = config["options"]["install_requires"] + extras["vision"] + extras.get("bench", "")
    names = {"pillow": "PIL", "pyro-ppl": "pyro", "scikit-learn": "sklearn"}
    declared = {names.get(name, name) for name in re.findall(r"^[\w-]+", required, re.MULTILINE)}
    known = declared | sys.stdlib_module_names | {"pyro_avi", "experiments", "gallery"}
    for folder in ("pyro_avi", "experiments", "gallery"):
        yield from (f"{found}: not in setup.cfg" for found in imports(root, folder) if found.package not in known)


def docstring_violations(root: Path) -> Iterator[str]:
    """Public functions, classes and methods of the library without a docstring."""
    for path in sorted((root / "pyro_avi").rglob("*.py")):
        pending: list[ast.AST] = [parse(path)]
        while pending:
            for node in ast.iter_child_nodes(pending.pop()):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    pending += [node] if isinstance(node, ast.ClassDef) else []
                    if not ast.get_docstring(node):
                        yield f"{path.relative_to(root).as_posix()}:{node.lineno}: {node.name} has no docstring"


CHECKS = (
    library_violations,
    import_time_violations,
    public_names_violations,
    gallery_violations,
    torchvision_violations,
    dependency_violations,
    docstring_violations,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_project_keeps_its_rules(check):
    assert list(check(ROOT)) == []


OBEDIENT = {
    "setup.cfg": "[options]\ninstall_requires =\n    pyro-ppl>=1.9.1\n    torch\n    tqdm\n    numpy\n    zuko\n"
    "[options.extras_require]\nvision =\n    torchvision\n",
    "pyro_avi/__init__.py": '"""Doc."""\nfrom .fit import fit\nfrom pyro_avi.guides import Guide\n'
    '__all__ = ["Guide", "fit"]\n',
    "pyro_avi/structure.py": "import math\nimport torch\nfrom pyro import poutine\n",
    "pyro_avi/provenance.py": "import torch\n",
    "pyro_avi/families/__init__.py": "from .flow import Flow\n",
    "pyro_avi/families/flow.py": "import pyro.distributions as dist\nimport zuko\n",
    "pyro_avi/encoders/__init__.py": 'from .mlp import mlp\n__all__ = ["mlp"]\n',
    "pyro_avi/encoders/mlp.py": "from torch import nn\n",
    "pyro_avi/models/__init__.py": 'from .vae import VAE\n__all__ = ["VAE"]\n',
    "pyro_avi/models/vae.py": "from __future__ import annotations\nimport pyro\n",
    "pyro_avi/guides/__init__.py": "from pyro_avi.guides.guide import Guide\n",
    "pyro_avi/guides/guide.py": "from ..structure import inspect\nfrom .. import encoders, families\n",
    "pyro_avi/fit.py": "from pyro_avi.steps import step\n",
    "pyro_avi/steps.py": "from pyro_avi.adam import Adam\n",
    "pyro_avi/weights.py": "from pyro_avi import perturbation\n",
    "pyro_avi/estimators/elbo.py": "import numpy as np\n",
    "pyro_avi/refine.py": "from pyro_avi.guides import Guide\nfrom pyro_avi.fit import fit\n",
    "experiments/run.py": "import pyro_avi as avi\nfrom pyro_avi.models import VAE\nfrom pyro_avi import encoders\n"
    "avi.fit\navi.models.VAE\nencoders.mlp\n",
    "gallery/vae.py": "import pyro\nimport torch\nimport pyro_avi as avi\nfrom gallery import compare\navi.fit\n",
    "experiments/datasets/mnist.py": "import numpy\ndef download():\n    from torchvision.datasets import MNIST\n",
}

VIOLATIONS = [
    (library_violations, "pyro_avi/structure.py", "from pyro_avi.provenance import replay"),
    (library_violations, "pyro_avi/structure.py", "import numpy"),
    (library_violations, "pyro_avi/provenance.py", "from . import families"),
    (library_violations, "pyro_avi/families/flow.py", "import pyro_avi.encoders"),
    (library_violations, "pyro_avi/guides/guide.py", "import zuko"),
    (library_violations, "pyro_avi/encoders/mlp.py", "def mlp():\n    from ..families import Normal"),
    (library_violations, "pyro_avi/models/vae.py", "from pyro_avi.encoders import mlp"),
    (library_violations, "pyro_avi/guides/guide.py", "from pyro_avi.fit import fit"),
    (library_violations, "pyro_avi/guides/guide.py", "from .. import models"),
    (library_violations, "pyro_avi/guides/guide.py", "import importlib\nimportlib.import_module('pyro_avi.fit')"),
    (library_violations, "pyro_avi/fit.py", "if TYPE_CHECKING:\n    from .guides import Guide"),
    (library_violations, "pyro_avi/fit.py", "from pyro_avi import Guide"),
    (library_violations, "pyro_avi/steps.py", "from pyro_avi.models import VAE"),
    (library_violations, "pyro_avi/weights.py", "from pyro_avi.guides.guide import Guide"),
    (library_violations, "pyro_avi/estimators/elbo.py", "import pyro"),
    (library_violations, "pyro_avi/estimators/elbo.py", "from ..weights import LogWeights"),
    (library_violations, "pyro_avi/refine.py", "import experiments"),
    (library_violations, "pyro_avi/__init__.py", "import pyro"),
    (library_violations, "pyro_avi/surprise.py", "import torch"),
    (import_time_violations, "pyro_avi/__init__.py", "configure()"),
    (public_names_violations, "experiments/run.py", "from pyro_avi import Hidden"),
    (public_names_violations, "experiments/run.py", "from pyro_avi.fit import fit"),
    (public_names_violations, "experiments/run.py", "import pyro_avi.guides"),
    (public_names_violations, "experiments/run.py", "from pyro_avi.models import _private"),
    (public_names_violations, "experiments/run.py", "avi._private()"),
    (public_names_violations, "experiments/run.py", "avi.models._private()"),
    (public_names_violations, "experiments/run.py", "encoders.conv"),
    (public_names_violations, "gallery/vae.py", "from pyro_avi.guides import Guide"),
    (public_names_violations, "gallery/vae.py", "avi._private()"),
    (gallery_violations, "gallery/vae.py", "import experiments"),
    (gallery_violations, "gallery/vae.py", "def data():\n    import numpy"),
    (torchvision_violations, "experiments/datasets/mnist.py", "import torchvision"),
    (torchvision_violations, "experiments/run.py", "def run():\n    import torchvision"),
    (torchvision_violations, "pyro_avi/fit.py", "from torchvision import datasets"),
    (dependency_violations, "experiments/run.py", "import seaborn"),
    (docstring_violations, "pyro_avi/fit.py", "def fit():\n    pass"),
    (docstring_violations, "pyro_avi/fit.py", 'class Fit:\n    """Doc."""\n    def plot(self):\n        pass'),
]


def write(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("check, file, statement", VIOLATIONS)
def test_a_violation_is_found(tmp_path, check, file, statement):
    for name, text in OBEDIENT.items():
        write(tmp_path, name, text)
    if check is not docstring_violations:
        assert list(check(tmp_path)) == []

    write(tmp_path, file, OBEDIENT.get(file, "") + statement)

    assert [message for message in check(tmp_path) if message.startswith(file)]


@pytest.mark.parametrize("module", ["pyro_avi", "pyro_avi.models", "pyro_avi.encoders"])
def test_every_public_name_exists_once_and_says_what_it_is(module):
    package = importlib.import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert vars(package)[name].__doc__, f"{module}.{name} has no docstring"


def test_importing_the_library_changes_no_global_state():
    state = """
import random, sys, warnings
import numpy, pyro, torch
def state():
    return [
        pyro.settings.get(), dict(pyro.get_param_store()), torch.distributions.Distribution._validate_args,
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()), list(warnings.filters),
    ]
before = state()
import pyro_avi
assert state() == before
assert not {"torchvision", "arviz", "matplotlib"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", state], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
