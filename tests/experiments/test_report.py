"""The report of the images sweep, drawn from records whose numbers are known."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.cell import Cell
from experiments.reports.images import document
from experiments.reports.images.cells import sections
from experiments.store import Store

GUIDES = (("constant", None), ("amortized", 1), ("amortized", 64), ("amortized", 256), ("factorized", None))
#: Final training ELBO, steps it takes to settle, train MSE, amortization gap: what a plausible run of each guide gives.
TRUTH = {
    ("constant", None): (-690.0, 40, 0.0675, 60.0),
    ("amortized", 1): (-520.0, 150, 0.052, 30.0),
    ("amortized", 64): (-242.0, 300, 0.011, 4.0),
    ("amortized", 256): (-238.0, 260, 0.0108, 2.0),
    ("factorized", None): (-236.0, 420, 0.0105, None),
}
MEAN_IMAGE = {"mnist": (0.0675, 0.0680), "fashionmnist": (0.0868, 0.0873)}
GRID = (0, 10, 20, 50, 100, 200, 300, 400, 600, 800, 1000, 1500, 2000, 2500, 3000)


def make_settings(**changes):
    settings = {
        "purpose": "result", "num_train": 10000, "data_seed": 0, "steps": GRID[-1], "batch_size": 1000,
        "latent_dim": 64, "hidden_dim": 256, "noise": "learned", "architecture": "dense", "lr_local": 1e-3,
        "lr_global": 1e-3,
    }  # fmt: skip
    return settings | changes


def make_record(settings, *, elbo=None, status="done", started="2026-01-05T10:00:00+00:00"):
    """A record as the images sweep writes it. `elbo` overrides the final training ELBO."""
    rng = np.random.default_rng(settings["seed"] + 7 * (settings["width"] or 0))
    guide = (settings["guide"], settings["width"])
    final, settle, mse, gap = TRUTH[guide]
    # At one small learning rate F-VI's table has not arrived when training ends.
    if settings["protocol"] == "published" and guide[0] == "factorized":
        final, settle, mse = -225.0, 1500, 0.009
    final = (final if elbo is None else elbo) + rng.normal(scale=0.6)
    mean_train, mean_test = MEAN_IMAGE[settings["dataset"]]
    mse *= mean_train / MEAN_IMAGE["mnist"][0]
    steps = np.array([step for step in GRID if step <= settings["steps"]])
    rate = {"constant": 0.004, "amortized": 0.006, "factorized": 0.011}[guide[0]] * rng.uniform(0.95, 1.05)
    left = np.exp(-steps / settle)
    curve = {
        "step": steps.tolist(),
        "seconds": (rate * steps).tolist(),
        "elbo": (final - 900 * left + rng.normal(scale=0.3, size=len(steps))).tolist(),
        "elbo_se": [0.3] * len(steps),
        "train_mse": (mse + 0.1 * left).tolist(),
        "test_mse": [None] * len(steps) if guide[0] == "factorized" else (mse + 0.002 + 0.1 * left).tolist(),
    }
    source = {"constant": "same for every row", "amortized": "encoder", "factorized": "refined, globals frozen"}
    picture = np.clip(np.hypot(*np.mgrid[-1:1:8j, -1:1:8j]), 0, 1).ravel()
    refined = None if gap is None else {
        rows: {"elbo": final + gap * scale, "elbo_se": 0.1, "rows": 1000, "gain": gap * scale, "gain_se": 0.05}
        for rows, scale in (("train", 1.0), ("test", 1.3))
    }  # fmt: skip
    result = {
        "status": status, "diverged_at": None, "curve": curve,
        "final": {
            rows: {"elbo": curve["elbo"][-1] - less, "elbo_se": 0.1, "mse": curve["train_mse"][-1], "rows": 10000}
            for rows, less in (("train", 0), ("test", 3))
        },
        "refined": refined,
        "parameters": {"local": 1000 * (guide[1] or 1), "global": 567840, "model": 1},
        "noise_scale": 0.11, "train_seconds": curve["seconds"][-1], "evaluation_seconds": 2.0,
        "mean_image_mse": {"train": mean_train, "test": mean_test},
        "images": {
            "shape": [1, 8, 8], "originals": [(picture * k / 5).tolist() for k in range(1, 6)],
            "reconstructions": [(picture * k / 5 * 0.9 + mse).tolist() for k in range(1, 6)],
        },
    }  # fmt: skip
    result["final"]["test"]["source"] = source[guide[0]]
    if status == "diverged":
        result |= {"diverged_at": 400, "refined": None, "images": None}
        result["curve"] = {name: values[:7] for name, values in curve.items()}
        result["final"] = {
            rows: values | {"elbo": None, "elbo_se": None, "mse": None} for rows, values in result["final"].items()
        }
    provenance = {
        "started": started, "seconds": 30.0, "command": "python -m experiments.sweep images", "commit": "0123abc",
        "dirty": False, "versions": {"python": "3.11", "torch": "2.13.0"},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2}, "threads": 1,
        "device": "cpu", "device_name": "cpu", "peak_memory_bytes": 4 * 2**28,
    }  # fmt: skip
    return {
        "format": 1, "sweep": "images", "key": Cell("images", settings).key, "settings": settings, "result": result,
        "provenance": provenance,
    }  # fmt: skip


def make_records(
    *,
    datasets=("mnist",),
    protocols=("published", "fair"),
    guides=GUIDES,
    seeds=(1954, 1789, 1790),
    **changes,
):
    """Records by key: results of every combination, and a tuning of two trials a guide for the fair protocol."""
    found = []
    for dataset in datasets:
        for guide, width in guides:
            here = make_settings(dataset=dataset, guide=guide, width=width) | changes
            found += [
                make_record(here | {"protocol": protocol, "seed": seed}) for protocol in protocols for seed in seeds
            ]
            if "fair" in protocols:
                found.append(make_tuning(here | {"protocol": "fair", "seed": 0, "steps": 100}))
    return {record["key"]: record for record in found}


def make_tuning(settings, *, rates=(1e-2, 1e-3)):
    """A tuning record as the images sweep writes it, with a trial at each of these rates of the local part."""
    record = make_record(settings)
    settings = {name: value for name, value in settings.items() if name not in ("lr_local", "lr_global")}
    settings |= {"purpose": "tuning", "grid": [[rate, 1e-3] for rate in rates]}
    trials = [
        {"lr_local": rate, "lr_global": 1e-3, "diverged_at": None, "elbo": -300.0 - rate, "elbo_se": 0.1}
        for rate in rates
    ]
    result = {"trials": trials, "train_seconds": 2.5, "evaluation_seconds": 0.5}
    return record | {"key": Cell("images", settings).key, "settings": settings, "result": result}


def results_of(records):
    return [record for record in records.values() if record["settings"]["purpose"] == "result"]


def saved(records, out):
    """A store that holds these records."""
    for record in records.values():
        Store(out).save(record)
    return out


def texts(records):
    """Title and text of every finding of the only section."""
    (found,) = document(records).sections
    return {finding.title: finding.text for finding in found.findings}


def with_a_diverged_cell(records):
    """The same, the first seed of A-VI k=64 under the published protocol diverged."""
    settings = make_settings(dataset="mnist", guide="amortized", width=64, protocol="published", seed=1954)
    broken = make_record(settings, status="diverged")
    assert broken["key"] in records
    return records | {broken["key"]: broken}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report over two protocols, three seeds, a diverged cell and an F-VI that has not converged."""
    out = saved(with_a_diverged_cell(make_records()), tmp_path_factory.mktemp("store"))
    (out / "images" / "report" / "figures").mkdir(parents=True)
    (out / "images" / "report" / "figures" / "of-an-older-report.png").write_bytes(b"")
    return report.write("images", out).parent


def test_the_page_is_one_file_that_asks_for_nothing_else(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list((written / "figures").glob("*.png"))) == 8
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"https?://|url\(|@import|<script", page)


def test_figures_are_small_and_those_of_an_older_report_are_gone(written):
    figures = list((written / "figures").glob("*.png"))
    assert {figure.name.removeprefix("mnist-dense-learned-3000-") for figure in figures} == {
        "loss.png", "mse-by-step.png", "mse-by-seconds.png", "time-to-elbo.png", "time-to-mse-0.03.png", "by-width.png",
        "reconstructions.png", "amortization-gap.png",
    }  # fmt: skip
    assert all(2_000 < figure.stat().st_size < 100_000 for figure in figures)


def test_markdown_links_to_every_figure(written):
    linked = re.findall(r"\]\((figures/[^)]+)\)", (written / "summary.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (written / "figures").iterdir())


def test_summary_holds_the_numbers_of_the_records(written):
    with (written / "summary.csv").open(encoding="utf-8") as file:
        lines = {(line["protocol"], line["guide"], line["width"]): line for line in csv.DictReader(file)}
    assert len(lines) == 10
    finals = {
        guide: [make_record(make_settings(dataset="mnist", protocol="fair", guide=guide, width=width, seed=seed))
                ["result"]["final"]["train"]["elbo"] for seed in (1954, 1789, 1790)]
        for guide, width in (("amortized", 64), ("factorized", None))
    }  # fmt: skip
    gaps = np.subtract(finals["factorized"], finals["amortized"])
    line = lines["fair", "amortized", "64"]
    assert float(line["joint_gap"]) == pytest.approx(gaps.mean())
    assert float(line["joint_gap_se"]) == pytest.approx(gaps.std(ddof=1) / math.sqrt(3))
    assert float(line["train_elbo"]) == pytest.approx(np.mean(finals["amortized"]))
    assert line["test_source"] == "encoder"
    assert lines["published", "amortized", "64"]["diverged"] == "1"
    assert float(lines["published", "factorized", ""]["step_to_elbo_level"]) == 3000
    assert lines["published", "factorized", ""]["step_to_elbo_level_is_lower_bound"] == "True"
    assert lines["fair", "factorized", ""]["step_to_mse_0.07"] == ""


def test_every_result_and_trial_is_a_line_of_the_cells(written):
    with (written / "cells.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    trials = [line for line in lines if line["purpose"] == "tuning"]
    assert len(lines) == 40 and len(trials) == 10
    assert {(line["lr_local"], line["train_elbo"], line["train_seconds"]) for line in trials} == {
        ("0.01", "-300.01", ""), ("0.001", "-300.001", "")
    }  # fmt: skip


def test_f_vi_below_a_vi_is_called_not_converged():
    found = texts(make_records())
    assert "A-VI k=64 by 104." in found["F-VI has not converged, published"]
    assert "F-VI by 48 nats" in found["Still rising, published"]
    assert "F-VI has not converged, fair" not in found
    assert "constant ≤ A-VI ≤ F-VI" in found["Order of the guides, fair"]
    assert "change places: A-VI k=256 with F-VI and A-VI k=64 with F-VI" in found["The ranking depends on the protocol"]


def test_reaching_f_vi_is_told_with_its_error():
    found = texts(make_records())["A-VI against F-VI, fair"]
    assert re.search(
        r"A-VI k=64 falls short of F-VI's ELBO by \d\.\d+ ± 0\.\d+ nats a row \(3 paired seeds, 1\.\d%", found
    )


def test_ratios_of_times_are_bounds_where_f_vi_does_not_get_there():
    found = texts(make_records())
    published = next(text for title, text in found.items() if title.startswith("Time to ELBO") and "published" in title)
    assert "F-VI needs more than 3,000 steps" in published
    assert "A-VI k=64 needs 1,500 steps and 9.01 s: F-VI / A-VI is more than 2.0 in steps" in published
    assert "up to 500 steps apart" in published


def test_a_tolerance_that_the_mean_image_passes_is_not_reported():
    assert "tolerance 0.07 says nothing" in texts(make_records())["A tolerance without meaning"]
    fashion = texts(make_records(datasets=("fashionmnist",)))
    assert "A tolerance without meaning" not in fashion and "Time to train MSE ≤ 0.07, fair" in fashion


def test_the_constant_guide_is_held_to_the_mean_image():
    records = make_records()
    assert "as it must be" in texts(records)["Constant guide = mean image, fair"]
    for record in results_of(records):
        record["result"]["mean_image_mse"]["train"] = 0.06
    assert "(+12.5%): they should be equal" in texts(records)["Constant guide = mean image, fair"]


def test_a_collapsed_model_is_called_so():
    records = make_records(guides=GUIDES[:2])
    assert "No collapse" in texts(records)
    for record in results_of(records):
        record["result"]["final"]["train"]["mse"] = 0.066
    assert "no guide can show a gap" in texts(records)["The model has collapsed"]


def test_a_diverged_cell_is_named_and_left_out_of_the_means():
    records = make_records()
    found = texts(with_a_diverged_cell(records))
    assert "A-VI k=64, published, seed 1954, at step 400" in found["Diverged"]
    assert "2 paired seeds" in found["A-VI against F-VI, published"]
    cells = sections(with_a_diverged_cell(records))[0].arm("published", "A-VI k=64").cells
    reached = {seed: cell.passage("train_mse", 0.06).reached for seed, cell in cells.items()}
    assert reached == {1789: True, 1790: True, 1954: False}


def test_tuning_is_added_up_a_guide():
    section = sections(make_records())[0]
    (tuning,) = section.arm("fair", "F-VI").tuning
    assert len(tuning.trials) == 2 and section.arm("published", "F-VI").tuning == ()
    assert section.arm("fair", "F-VI").tuning_seconds == 2.5
    assert "F-VI 2.5 s in 2 runs." in texts(make_records())["Cost of tuning"]
    # One more grid.
    more = make_tuning(tuning.record["settings"], rates=(0.3,))
    told = texts(make_records() | {more["key"]: more})["Cost of tuning"]
    assert "A-VI k=256 2.5 s in 2 runs and F-VI 5 s in 3 runs." in told


def test_cells_that_were_to_be_compiled_and_were_not_are_told(tmp_path):
    records = make_records(seeds=(1, 2), guides=GUIDES[:1])
    assert ["compiled", "unknown"] in document(records).provenance.rows
    for record in records.values():
        record["provenance"] |= {"compiled": ["The training step"], "fallbacks": []}
    out = saved(records, tmp_path)
    drawn = report.document("images", out)
    assert ["compiled", "The training step"] in drawn.provenance.rows
    assert "Not compiled" not in {finding.title for finding in drawn.findings}
    record = next(iter(records.values()))
    record["provenance"] |= {"compiled": [], "fallbacks": ["The training step is evaluated eagerly: no disk."]}
    drawn = report.document("images", saved(records, tmp_path))
    (told,) = [finding for finding in drawn.findings if finding.title == "Not compiled"]
    assert told.kind == "warning" and f"1 of {len(records)} cells" in told.text and "no disk" in told.text


def test_sections_keep_settings_apart():
    records = make_records() | make_records(noise="fixed") | make_records(latent_dim=2)
    assert [section.name for section in document(records).sections] == [
        "mnist-dense-fixed-3000", "mnist-dense-learned-3000", "mnist-dense-learned-3000-2",
    ]  # fmt: skip


def test_other_learning_rates_are_named_not_mixed_in():
    other = make_record(
        make_settings(dataset="mnist", guide="constant", width=None, protocol="fair", seed=1, lr_local=0.1)
    )
    records = make_records() | {other["key"]: other}
    assert "constant (fair) at 0.1 / 0.001" in texts(records)["More than one pair of learning rates"]
    assert list(sections(records)[0].arm("fair", "constant").cells) == [1789, 1790, 1954]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (make_records(protocols=("published",)), {"Incomplete": "no record of the fair protocol"}),
        (make_records(guides=GUIDES[:1]), {"Incomplete": "no record of F-VI under the fair protocol"}),
        (make_records(guides=GUIDES[-1:], protocols=("fair",)), {"Incomplete": "no record of the constant guide"}),
        (make_records(guides=GUIDES[1:2] + GUIDES[-1:]), {"A-VI against F-VI, fair": "the widest stands in"}),
        (make_records(seeds=(1,), guides=GUIDES[2:3]), {"One seed": "the Monte Carlo error alone"}),
        (with_a_diverged_cell(make_records(seeds=(1954,), guides=GUIDES[2:3])), {"Diverged": "seed 1954"}),
    ],
    ids=["one protocol", "constant alone", "F-VI alone", "narrow encoders", "one seed", "nothing left"],
)
def test_part_of_a_sweep_is_drawn_and_says_what_is_missing(records, told):
    found = texts(records)
    for title, text in told.items():
        assert text in found[title]
    drawn = document(records)
    assert all(figure.png.startswith(b"\x89PNG") for section in drawn.sections for figure in section.figures)
    assert "nan" not in report.render("summary.md", drawn) + report.terminal(drawn)


def test_tuning_alone_is_no_result_yet():
    records = {key: record for key, record in make_records().items() if record["settings"]["purpose"] == "tuning"}
    assert "tuning cells alone" in document(records).findings[0].text


def test_a_color_image_keeps_its_colors():
    records = make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",))
    noise = np.random.default_rng(0).uniform(size=(5, 3 * 32 * 32)).tolist()
    for record in records.values():
        record["result"]["images"] = {"shape": [3, 32, 32], "originals": noise, "reconstructions": noise}
    figure = next(figure for figure in document(records).sections[0].figures if figure.name == "reconstructions")
    assert len(figure.png) > 20_000


def test_provenance_counts_cells_that_ran_at_once():
    records = make_records(seeds=(1,), guides=GUIDES[:3], protocols=("published",))
    for minute, record in enumerate(records.values()):
        record["provenance"]["started"] = f"2026-01-05T10:00:{min(minute, 1) * 20:02d}+00:00"
    assert ["cells running at once", "up to 3"] in document(records).provenance.rows
    for minute, record in enumerate(records.values()):
        record["provenance"]["started"] = f"2026-01-05T10:{minute:02d}:00+00:00"
    assert ["cells running at once", "up to 1"] in document(records).provenance.rows


def test_a_record_without_a_field_is_named():
    records = make_records(seeds=(1,), guides=GUIDES[:1])
    key = next(iter(records))
    del records[key]["result"]["final"]
    with pytest.raises(report.ReportError, match=f"Expected result.final.* in the record '{key}'"):
        document(records)


def test_command_line_prints_the_table_and_the_place(tmp_path, capsys):
    saved(make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",)), tmp_path)
    assert report.main(["images", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert report.table_text("images", tmp_path) in printed
    assert printed.rstrip().endswith(str(Path("images", "report", "report.html")))


def test_command_line_explains_what_it_cannot_do(tmp_path, capsys):
    assert report.main(["images", "--out", str(tmp_path)]) == 2
    assert "python -m experiments.sweep images" in capsys.readouterr().err
    assert report.main(["pictures", "--out", str(tmp_path)]) == 2
    assert f"one of {', '.join(report.names())}; got 'pictures'" in capsys.readouterr().err
    saved(make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",)), tmp_path)
    (tmp_path / "images" / "report").write_text("in the way")
    assert report.main(["images", "--out", str(tmp_path)]) == 2
    assert "Cannot write the report" in capsys.readouterr().err
    next((tmp_path / "images" / "cells").glob("*.json")).write_text("{")
    assert report.main(["images", "--out", str(tmp_path)]) == 2
    assert "corrupt" in capsys.readouterr().err


def test_the_report_does_not_load_what_trains():
    code = "import sys, experiments.report, experiments.reports.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
