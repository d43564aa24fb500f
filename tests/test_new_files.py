"""What a newcomer adds is one file: the tests of its kind take it in, and no other file is touched.

The folder `new_files` has one of each kind. Each is put into a copy of the checkout, where the tests of its kind are run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEW = ROOT / "tests" / "new_files"

# A file, the tests of its kind, and the word by which those of it are chosen.
CASES = [
    ("pyro_avi/guides/boxed.py", ["tests/guides/test_guides.py"], "BoxedGuide"),
    ("pyro_avi/guides/boxed.py", ["tests/guides/test_contract.py"], "BoxedGuide and DiagonalNormal and crossed"),
    ("pyro_avi/families/laplace.py", ["tests/families/test_families.py"], "Laplace"),
    ("pyro_avi/families/laplace.py", ["tests/guides/test_contract.py"], "Laplace and saved"),
    ("pyro_avi/encoders/waves.py", ["tests/encoders/test_encoders.py", "pyro_avi/encoders"], "Waves"),
    ("pyro_avi/estimators/renyi.py", ["tests/estimators/test_estimators.py"], "renyi"),
    ("experiments/datasets/stripes.py", ["tests/experiments/test_datasets.py"], "stripes"),
    ("experiments/runner/engines/tidy.py", ["tests/experiments/runner/test_engines.py"], "tidy"),
    ("experiments/sweeps/powers.py", ["tests/experiments/test_sweeps.py"], "powers"),
]
RULES = ["tests/test_architecture.py", "tests/experiments/test_rooms.py"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with all of the new files in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("pyro_avi", "experiments", "gallery", "tests", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    files = sorted(path.relative_to(NEW) for path in NEW.rglob("*.py"))
    assert [path.as_posix() for path in files] == sorted({file for file, _, _ in CASES})
    for file in files:
        assert not (copy / file).exists()
        shutil.copy(NEW / file, copy / file)
    return copy


def run(checkout, *line):
    """Run a module with the copy in the place of this checkout."""
    return subprocess.run(
        [sys.executable, "-m", *line],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def passed(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


@pytest.mark.slow
@pytest.mark.parametrize("file, tests, word", CASES)
def test_the_tests_of_its_kind_take_it_in(checkout, file, tests, word):
    line = ("pytest", "-q", "--numprocesses=0", "-m", "", "-p", "no:cacheprovider", "-k", word, *tests)
    assert passed(run(checkout, *line)) >= 1


@pytest.mark.slow
def test_the_rules_of_the_rooms_hold(checkout):
    assert passed(run(checkout, "pytest", "-q", "--numprocesses=0", "-p", "no:cacheprovider", *RULES)) >= 1


@pytest.mark.slow
def test_a_sweep_of_a_newcomers_has_a_page_with_a_figure(checkout, tmp_path):
    out = tmp_path / "results"
    done = run(
        checkout, "experiments.sweep", "powers", "--device", "cpu", "--engine", "tidy", "--jobs", "1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    report = out / "powers" / "report"
    assert "The largest is 64." in (report / "report.html").read_text()
    assert "data:image/png;base64," in (report / "report.html").read_text()
    assert len(list((report / "figures").glob("*.png"))) == 1
    assert len((report / "summary.csv").read_text().splitlines()) == 9
