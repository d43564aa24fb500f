"""The rooms of `experiments`: who may import whom, no circle, few files each.

The rules are the table of the architecture page. Imports inside functions count.
"""

import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_architecture import Import, imports

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 12


def rules(root: Path) -> dict[str, set[str]]:
    """The rooms that each room may import, itself left out."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| room of `experiments` .*\n\| --- .*\n((?:\|.*\n)+)", text)
    lines = [line.split("|")[1:3] for line in table.splitlines()]
    return {
        room: set(re.findall(r"`(.+?)`", allowed)) for rooms, allowed in lines for room in re.findall(r"`(.+?)`", rooms)
    }


def target(root: Path, found: Import) -> str:
    """The module that is imported: a name of a package may be a module in it."""
    inner = f"{found.module}.{found.name}"
    path = root.joinpath(*inner.split("."))
    return inner if path.is_dir() or path.with_suffix(".py").exists() else found.module


def room_of(module: str) -> str:
    """``sweeps/images`` for modules of that sweep, else the first part of the name."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2] if parts[:1] == ["sweeps"] else parts[:1])


def edges(root: Path) -> Iterator[tuple[str, str]]:
    """(importer, imported) for every import of `experiments` within it."""
    for found in imports(root, "experiments"):
        if found.package == "experiments":
            parts = found.file.with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), target(root, found)


def layer_violations(root: Path) -> Iterator[str]:
    """Imports that the table does not allow, and rooms that it does not know."""
    table = rules(root)
    for importer, imported in edges(root):
        here, there = room_of(importer), room_of(imported)
        rule = table.get(re.sub("^sweeps/.+", "sweeps/NAME", here))
        if rule is None:
            yield f"{importer}: the table has no room {here}"
        elif there not in rule | {here}:
            yield f"{importer} imports {imported}: {here} may import {sorted(rule) or 'nothing'}"


def circles(root: Path) -> Iterator[str]:
    """Modules that import each other in a circle."""
    graph: dict[str, set[str]] = {}
    for importer, imported in edges(root):
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def crowded_rooms(root: Path) -> Iterator[str]:
    """Folders with too many files."""
    files = Counter(path.parent.relative_to(root).as_posix() for path in (root / "experiments").rglob("*.py"))
    yield from (f"{folder}: {count} files" for folder, count in files.items() if count > MOST_FILES)


@pytest.mark.parametrize("check", [layer_violations, circles, crowded_rooms])
def test_the_rooms_keep_their_rules(check):
    assert list(check(ROOT)) == []


def test_every_room_is_in_the_table():
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")} - {"sweeps"}
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert rules(ROOT).keys() == folders | files | {"sweeps/NAME"}


OBEDIENT = {
    "docs/architecture.md": "| room of `experiments` | may import |\n| --- | --- |\n| `datasets`, `runner` | nothing |\n"
    "| `sweeps/NAME` | `runner`, `datasets` |\n| `sweep` | `runner` |\n",
    "experiments/datasets/__init__.py": "from . import _files\n",
    "experiments/datasets/_files.py": "import numpy\n",
    "experiments/runner/cell.py": "import json\n",
    "experiments/sweep.py": "from experiments.runner import cell\n",
    "experiments/sweeps/images/__init__.py": "def run():\n    from experiments.sweeps.images.training import train\n",
    "experiments/sweeps/images/training.py": "from experiments import datasets\nfrom experiments.runner.cell import Cell\n",
    "experiments/sweeps/speed/__init__.py": "",
}


@pytest.mark.parametrize(
    "check, file, statement",
    [
        (layer_violations, "experiments/runner/cell.py", "import experiments.sweeps.images"),
        (layer_violations, "experiments/runner/cell.py", "from experiments import datasets"),
        (layer_violations, "experiments/sweeps/speed/__init__.py", "from experiments.sweeps import images"),
        (layer_violations, "experiments/sweeps/speed/__init__.py", "from ...sweep import main"),
        (layer_violations, "experiments/attic.py", "from experiments import datasets"),
        (circles, "experiments/sweeps/images/training.py", "def f():\n    from experiments.sweeps.images import run"),
        (circles, "experiments/datasets/_files.py", "from experiments import datasets"),
    ],
)
def test_a_violation_is_found(tmp_path, check, file, statement):
    for name, text in OBEDIENT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(check(tmp_path)) == []
    (tmp_path / file).write_text(OBEDIENT.get(file, "") + statement)
    assert list(check(tmp_path)) != []


def test_a_crowded_room_is_found(tmp_path):
    (tmp_path / "experiments").mkdir()
    for number in range(MOST_FILES + 1):
        assert list(crowded_rooms(tmp_path)) == []
        (tmp_path / "experiments" / f"{number}.py").touch()
    assert list(crowded_rooms(tmp_path)) == ["experiments: 13 files"]
