"""The command that does all that waits for a device: in pieces, with a page; and the whole of it in small."""

import json
import subprocess
import sys

import pytest

from experiments import cuda
from tests.experiments.conftest import REPOSITORY
from tests.marks import needs_compiler


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs the command on parts of one's own, with so many seconds for them."""
    monkeypatch.setattr(cuda, "_PATIENCE", 0.2)

    def run(parts, seconds=50.0):
        monkeypatch.setattr(cuda, "_parts", lambda options: [cuda._Part(*part) for part in parts.items()])
        monkeypatch.setattr(cuda, "_RESERVE", 60.0 - seconds)
        code = cuda.main(["--rehearse", "--seconds", "60", "--out", str(tmp_path)])
        return code, capsys.readouterr().out, (tmp_path / "page" / "summary.md").read_text()

    return run


SAYS, WAITS = ["-c", "print('spoken')"], ["-c", "import time; time.sleep(100)"]


def test_it_goes_on_where_time_was_over(here):
    code, out, page = here({"first": SAYS, "second, long": WAITS, "third": SAYS}, seconds=1.0)
    assert code == 3 and "the same command goes on" in out
    assert "| first | done |" in page and "| second, long | to go on |" in page and "| third | to go on |" in page

    code, out, page = here({"first": WAITS, "second, long": SAYS, "third": SAYS})
    assert code == 0 and "== first" not in out and out.count("spoken") == 2
    assert page.count("done") == 3


def test_a_part_that_fails_stops_no_other_and_is_tried_again(here):
    code, out, page = here({"one": ["-c", "raise SystemExit('no such thing')"], "two": SAYS})
    assert code == 1 and "spoken" in out
    assert "**Failed: one.** no such thing" in page and "| one | failed |" in page
    code, _, page = here({"one": SAYS, "two": SAYS})
    assert code == 0 and "Failed" not in page


def test_tests_are_told_one_by_one_and_not_repeated(here, tmp_path):
    junit = """<testsuites><testsuite>
    <testcase classname="a" name="b" time="0.5"/>
    <testcase classname="a" name="c" time="1.5"><failure message="two is not one">trace</failure></testcase>
    <testcase classname="a" name="d"><skipped message="no device"/></testcase></testsuite></testsuites>"""
    write = f"import sys; open({str(tmp_path / 'parts' / 'tests.xml')!r}, 'w').write({junit!r}); sys.exit(1)"
    code, _, page = here({"tests": ["-c", write]})
    assert code == 1 and "**Tests.** 1 passed, 1 failed, 1 skipped." in page and "| a.c | failed | 1.5 |" in page
    (_, failed, _) = json.loads((tmp_path / "parts" / "tests.json").read_text())["tests"]
    assert failed == {"test": "a.c", "outcome": "failed", "seconds": 1.5, "message": "two is not one"}
    assert here({"tests": SAYS})[:2] == (1, f"\nPage: {tmp_path / 'page' / 'report.html'}\n")


def test_without_a_device_it_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cuda.main(["--out", str(tmp_path)]) == 2
    assert "Expected a CUDA device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        cuda.main(["--seconds", "5"])


def test_the_parts_on_a_device(tmp_path):
    """Every test of the marker is among them, and the commands are understood."""
    options = cuda._parse(["--out", str(tmp_path), "--data-dir", "data"])
    parts = {part.name: part.command for part in cuda._parts(options)}
    marked = {"test_cuda_graph.py", "test_host_rows.py", "test_other_device.py", "test_guide_life.py"}
    assert marked <= {word.rpartition("/")[2] for word in parts.pop("tests")}
    for command in parts.values():
        assert command[command.index("--device") + 1] == "cuda"
        # Planned only: there is no device here.
        planned = [sys.executable, *command[: command.index("--data-dir")], "--status"]
        done = subprocess.run(planned, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2) and "usage" not in done.stderr
        assert "0 finished" in done.stdout or "mnist" in done.stderr.lower()


@pytest.mark.slow
@needs_compiler
def test_the_whole_command_in_small(tmp_path):
    command = [sys.executable, "-m", "experiments.cuda", "--rehearse", "--seconds", "3000", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {path.stem: json.loads(path.read_text())["exit"] for path in (tmp_path / "parts").glob("*.json")}
    assert states == {"tests": 0, "speed": 0, "images": 0}
    (path,) = (tmp_path / "speed" / "cells").iterdir()
    speed = json.loads(path.read_text())
    assert {"compiled", "hand"} <= speed["result"]["ms"].keys() and "hand graph" in speed["result"]["left_out"]
    page = (tmp_path / "page" / "summary.md").read_text()
    assert "## Speed" in page and "skipped" in page and "A-VI k=2" in page
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "==" not in again.stdout
