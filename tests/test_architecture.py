"""Who may import whom, what the package exports, and that importing it does nothing else.

The rules are those of the table on the architecture page of the documentation, one for each room of the library. Imports
are read from the syntax trees of the files, so that one inside a function or under ``TYPE_CHECKING`` counts like any other.
`test_a_violation_is_found` breaks each rule in a small tree of its own.
"""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TENSORS = frozenset({"torch", "pyro"})
# Files in the root of the library, and in one of its rooms but for those whose files stand side by side.
MAX_ROOT, MAX_ROOM, UNBOUNDED = 8, 12, frozenset({"models", "gradients/estimators"})


@dataclass(frozen=True)
class Rule:
    """What some parts of the library may import: its parts that stand above them, and packages beyond the standard library."""

    parts: frozenset[str]
    packages: frozenset[str]


def read_rules(root: Path) -> dict[str, Rule]:
    """The rule of each room and of each module in the root of the library, in the order of the architecture page.

    A line of the table there is ``| parts | parts that they may import | packages |``. "The ground" are the parts of the line
    that says so, and "what a part may" is what the line of that part allows.
    """
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("\n| room |")[2].partition("\n\n")[0]
    rules: dict[str, Rule] = {}
    ground: set[str] = set()
    for line in table.splitlines()[2:]:
        own, allowed, packages = line.split("|")[1:-1]
        parts = set(re.findall(r"`(\w+)`", own))
        if "the ground" in own:
            ground = parts
        inherited = re.findall(r"what `(\w+)` may", allowed)
        may = set(re.findall(r"`(\w+)`", re.sub(r"what `\w+` may", "", allowed)))
        may |= ground if "the ground" in allowed else set()
        may = may.union(*(rules[part].parts for part in inherited))
        unknown = may - rules.keys()
        assert not unknown, f"{sorted(parts)} may import {sorted(unknown)}, which do not stand above them"
        # Modules of the ground stand side by side.
        rule = Rule(frozenset(may | (parts & ground)), frozenset(re.findall(r"`(\w+)`", packages)))
        rules |= dict.fromkeys(parts, rule)
    return rules


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
    """Imports that the table of rules does not allow, parts that it does not know, and lines of it that no part has."""
    rules = read_rules(root)
    parts = set()
    for path in sorted((root / "pyro_avi").rglob("*.py")):
        file = path.relative_to(root)
        importer = file.parts[1].removesuffix(".py")
        parts.add(importer)
        if importer == "__init__":
            rule = Rule(frozenset(rules), frozenset())
        elif importer in rules:
            rule = rules[importer]
        else:
            yield f"{file.as_posix()}: no rule says what it may import"
            continue
        for found in imports_below(parse(path), file):
            if found.package == "pyro_avi" and found.part not in rule.parts | {importer}:
                yield f"{found}: of the library {importer} may import {sorted(rule.parts) or 'nothing'}"
            elif found.package not in rule.packages | sys.stdlib_module_names | {"pyro_avi"}:
                yield f"{found}: beyond the standard library {importer} may import {sorted(rule.packages)}"
    yield from (f"docs/architecture.md: there is no part {part}" for part in sorted(rules.keys() - parts))


def circle_violations(root: Path) -> Iterator[str]:
    """Modules of the library that import themselves by way of others."""
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in (root / "pyro_avi").rglob("*.py")}
    files = {module.removesuffix(".__init__"): path for module, path in files.items()}
    graph = {}
    for module, path in files.items():
        found = [one for one in imports_below(parse(path), path.relative_to(root)) if one.package == "pyro_avi"]
        named = {f"{one.module}.{one.name}" if f"{one.module}.{one.name}" in files else one.module for one in found}
        graph[module] = named & files.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{files[error.args[1][0]].relative_to(root).as_posix()}: a circle, {' <- '.join(error.args[1])}"


def size_violations(root: Path) -> Iterator[str]:
    """Rooms with more files than one can look over."""
    library = root / "pyro_avi"
    for folder in [library, *sorted(path.parent for path in library.rglob("__init__.py") if path.parent != library)]:
        most = MAX_ROOT if folder == library else MAX_ROOM
        files = sorted(path.name for path in folder.glob("*.py"))
        if len(files) > most and folder.relative_to(library).as_posix() not in UNBOUNDED:
            yield f"{folder.relative_to(root).as_posix()}: at most {most} files, got {files}"
    for path in sorted(library.rglob("*.py")):
        if not (path.parent / "__init__.py").exists():
            yield f"{path.relative_to(root).as_posix()}: its folder has no __init__.py, and is not in the wheel"


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
    required = (
        config["options"]["install_requires"] + extras["vision"] + extras.get("bench", "") + extras.get("cluster", "")
    )
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
    circle_violations,
    size_violations,
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
    "docs/architecture.md": "# Architecture\n\n| room | may import | packages |\n| --- | --- | --- |\n"
    "| the ground: `errors`, `seeds` | | `torch` |\n"
    "| `families` | | `pyro`, `zuko` |\n"
    "| `encoders` | | `torch` |\n"
    "| `models` | the ground | `pyro` |\n"
    "| `estimators` (arrays only) | | `numpy` |\n"
    "| `inspection` | the ground | `torch`, `pyro` |\n"
    "| `guides` | the ground, `inspection`, `families`, `encoders` | `torch` |\n"
    "| `training` (accepts any guide) | the ground, `inspection` | `torch` |\n"
    "| `closing` | what `training` may; `guides`, `training` | `torch` |\n"
    "| `storage` | `guides` | |\n\nMore.\n",
    "pyro_avi/__init__.py": '"""Doc."""\nfrom .training.fit import fit\nfrom pyro_avi.guides import Guide\n'
    '__all__ = ["Guide", "fit"]\n',
    "pyro_avi/errors.py": "",
    "pyro_avi/seeds.py": "import torch\nfrom pyro_avi import errors\n",
    "pyro_avi/storage.py": "import json\nfrom pyro_avi.guides import Guide\n",
    "pyro_avi/inspection/__init__.py": "",
    "pyro_avi/inspection/structure.py": "import math\nimport torch\nfrom pyro import poutine\nfrom pyro_avi import seeds\n",
    "pyro_avi/inspection/sites.py": "import torch\nfrom pyro_avi.inspection.structure import Structure\n",
    "pyro_avi/families/__init__.py": "from .flow import Flow\n",
    "pyro_avi/families/flow.py": "import pyro.distributions as dist\nimport zuko\n",
    "pyro_avi/encoders/__init__.py": 'from .mlp import mlp\n__all__ = ["mlp"]\n',
    "pyro_avi/encoders/mlp.py": "from torch import nn\n",
    "pyro_avi/models/__init__.py": 'from .vae import VAE\n__all__ = ["VAE"]\n',
    "pyro_avi/models/vae.py": "from __future__ import annotations\nimport pyro\nfrom pyro_avi.errors import CallError\n",
    "pyro_avi/guides/__init__.py": "from pyro_avi.guides.guide import Guide\n",
    "pyro_avi/guides/guide.py": "from ..inspection.structure import inspect\nfrom .. import encoders, families\n",
    "pyro_avi/training/__init__.py": "",
    "pyro_avi/training/fit.py": "from pyro_avi.training.loop import run\nfrom pyro_avi.inspection import structure\n",
    "pyro_avi/training/loop.py": "import torch\nfrom pyro_avi.seeds import seeded\n",
    "pyro_avi/estimators/__init__.py": "",
    "pyro_avi/estimators/elbo.py": "import numpy as np\n",
    "pyro_avi/closing/__init__.py": "",
    "pyro_avi/closing/refine.py": "from pyro_avi.guides import Guide\nfrom pyro_avi.training.fit import fit\n"
    "from pyro_avi import inspection\n",
    "experiments/runner/run_cell.py": "import pyro_avi as avi\nfrom pyro_avi.models import VAE\nfrom pyro_avi import encoders\n"
    "avi.fit\navi.models.VAE\nencoders.mlp\n",
    "gallery/vae.py": "import pyro\nimport torch\nimport pyro_avi as avi\nfrom gallery import compare\navi.fit\n",
    "experiments/datasets/mnist.py": "import numpy\ndef download():\n    from torchvision.datasets import MNIST\n",
}

VIOLATIONS = [
    (library_violations, "pyro_avi/inspection/structure.py", "from pyro_avi.guides import Guide"),
    (library_violations, "pyro_avi/inspection/structure.py", "import numpy"),
    (library_violations, "pyro_avi/inspection/sites.py", "from .. import families"),
    (library_violations, "pyro_avi/errors.py", "import pyro"),
    (library_violations, "pyro_avi/seeds.py", "from pyro_avi.inspection.structure import inspect"),
    (library_violations, "pyro_avi/families/flow.py", "import pyro_avi.encoders"),
    (library_violations, "pyro_avi/families/flow.py", "from ..errors import CallError"),
    (library_violations, "pyro_avi/guides/guide.py", "import zuko"),
    (library_violations, "pyro_avi/encoders/mlp.py", "def mlp():\n    from ..families import Normal"),
    (library_violations, "pyro_avi/models/vae.py", "from pyro_avi.encoders import mlp"),
    (library_violations, "pyro_avi/guides/guide.py", "from pyro_avi.training.fit import fit"),
    (library_violations, "pyro_avi/guides/guide.py", "from .. import models"),
    (
        library_violations,
        "pyro_avi/guides/guide.py",
        "import importlib\nimportlib.import_module('pyro_avi.training.fit')",
    ),
    (library_violations, "pyro_avi/training/fit.py", "if TYPE_CHECKING:\n    from ..guides import Guide"),
    (library_violations, "pyro_avi/training/fit.py", "from pyro_avi import Guide"),
    (library_violations, "pyro_avi/training/loop.py", "from pyro_avi.models import VAE"),
    (library_violations, "pyro_avi/training/loop.py", "from pyro_avi.closing import refine"),
    (library_violations, "pyro_avi/estimators/elbo.py", "import pyro"),
    (library_violations, "pyro_avi/estimators/elbo.py", "from ..inspection import structure"),
    (library_violations, "pyro_avi/closing/refine.py", "import experiments"),
    (library_violations, "pyro_avi/closing/refine.py", "from pyro_avi.families import Flow"),
    (library_violations, "pyro_avi/storage.py", "import torch"),
    (library_violations, "pyro_avi/__init__.py", "import pyro"),
    (library_violations, "pyro_avi/surprise.py", "import torch"),
    (library_violations, "pyro_avi/surprise/part.py", "import torch"),
    (
        circle_violations,
        "pyro_avi/inspection/structure.py",
        "def inspect():\n    from pyro_avi.inspection import sites",
    ),
    (circle_violations, "pyro_avi/seeds.py", "from . import seeds"),
    (circle_violations, "pyro_avi/guides/guide.py", "from pyro_avi.guides import Guide"),
    (size_violations, "pyro_avi/surprise/part.py", "import torch"),
    (import_time_violations, "pyro_avi/__init__.py", "configure()"),
    (public_names_violations, "experiments/runner/run_cell.py", "from pyro_avi import Hidden"),
    (public_names_violations, "experiments/runner/run_cell.py", "from pyro_avi.training.fit import fit"),
    (public_names_violations, "experiments/runner/run_cell.py", "import pyro_avi.guides"),
    (public_names_violations, "experiments/runner/run_cell.py", "from pyro_avi.models import _private"),
    (public_names_violations, "experiments/runner/run_cell.py", "avi._private()"),
    (public_names_violations, "experiments/runner/run_cell.py", "avi.models._private()"),
    (public_names_violations, "experiments/runner/run_cell.py", "encoders.conv"),
    (public_names_violations, "gallery/vae.py", "from pyro_avi.guides import Guide"),
    (public_names_violations, "gallery/vae.py", "avi._private()"),
    (gallery_violations, "gallery/vae.py", "import experiments"),
    (gallery_violations, "gallery/vae.py", "def data():\n    import numpy"),
    (torchvision_violations, "experiments/datasets/mnist.py", "import torchvision"),
    (torchvision_violations, "experiments/runner/run_cell.py", "def run():\n    import torchvision"),
    (torchvision_violations, "pyro_avi/training/fit.py", "from torchvision import datasets"),
    (dependency_violations, "experiments/runner/run_cell.py", "import seaborn"),
    (docstring_violations, "pyro_avi/training/fit.py", "def fit():\n    pass"),
    (docstring_violations, "pyro_avi/training/fit.py", 'class Fit:\n    """Doc."""\n    def plot(self):\n        pass'),
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


@pytest.mark.parametrize(
    "folder, most", [("pyro_avi", MAX_ROOT), ("pyro_avi/guides", MAX_ROOM), ("pyro_avi/models", None)]
)
def test_a_room_has_so_many_files_and_no_more(tmp_path, folder, most):
    for name, text in OBEDIENT.items():
        write(tmp_path, name, text)
    for count in range((most or MAX_ROOM) - len(list((tmp_path / folder).glob("*.py")))):
        write(tmp_path, f"{folder}/file_{count}.py", "")
    assert list(size_violations(tmp_path)) == []

    write(tmp_path, f"{folder}/another.py", "")

    found = list(size_violations(tmp_path))
    assert [message.partition(":")[0] for message in found] == ([folder] if most else [])


def test_a_line_of_the_table_is_of_a_part_and_allows_what_stands_above_it(tmp_path):
    for name, text in OBEDIENT.items():
        write(tmp_path, name, text)
    page = OBEDIENT["docs/architecture.md"]
    write(tmp_path, "docs/architecture.md", page.replace("\n\nMore", "\n| `attic` | the ground | |\n\nMore"))
    assert list(library_violations(tmp_path)) == ["docs/architecture.md: there is no part attic"]

    write(tmp_path, "docs/architecture.md", page.replace("`inspection` | the ground |", "`inspection` | `guides` |"))
    with pytest.raises(AssertionError, match="stand above"):
        read_rules(tmp_path)


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
