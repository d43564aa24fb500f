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
from experiments.reporting import figures, pages
from experiments.reporting.statistics import Mean, with_error
from experiments.runner.store import Store
from experiments.sweeps.images.report import curves, document
from tests.experiments.sweeps.images.records import (
    GUIDES,
    SEEDS,
    make_record,
    make_records,
    make_settings,
    make_tuning,
    results_of,
)
from tests.experiments.sweeps.images.reports import claim, section_of, texts, unfinished, with_a_diverged_cell


def saved(records, out):
    """A store that holds these records."""
    for record in records.values():
        Store(out).save(record)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report over two protocols, three seeds and a diverged cell."""
    out = saved(with_a_diverged_cell(make_records()), tmp_path_factory.mktemp("store"))
    (out / "images" / "report" / "figures").mkdir(parents=True)
    (out / "images" / "report" / "figures" / "of-an-older-report.png").write_bytes(b"")
    return report.write("images", out).parent


def test_the_page_is_one_file_that_asks_for_nothing_else(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list((written / "figures").glob("*.png"))) == 4
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"https?://|url\(|@import|<script", page)


def test_the_page_opens_with_the_answer_and_its_figure(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    order = [
        page.index(text) for text in ("Amortization costs", "data:image/png", "two to three times faster", "<section")
    ]
    assert order == sorted(order)


def test_figures_are_small_and_those_of_an_older_report_are_gone(written):
    found = list((written / "figures").glob("*.png"))
    assert {figure.name.removeprefix("mnist-dense-learned") for figure in found} == {
        ".png", "-elbo.png", "-mse.png", "-reconstructions.png",
    }  # fmt: skip
    assert all(2_000 < figure.stat().st_size < 100_000 for figure in found)


def test_markdown_links_to_every_figure(written):
    linked = re.findall(r"\]\((figures/[^)]+)\)", (written / "summary.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (written / "figures").iterdir())


def test_summary_holds_the_numbers_of_the_records(written):
    with (written / "summary.csv").open(encoding="utf-8") as file:
        lines = {(line["protocol"], line["guide"], line["width"]): line for line in csv.DictReader(file)}
    assert len(lines) == 11
    line = lines["fair", "amortized", "64"]
    fair = {width: results_of(make_records(), guide="amortized", width=width, protocol="fair") for width in (64, 256)}
    own = [record["result"]["final"]["train"]["elbo"] for record in fair[64]]
    further = [record["result"]["continued"]["final"]["train"]["elbo"] for record in fair[256]]
    assert float(line["joint_gap"]) == pytest.approx(np.mean(further) - np.mean(own))
    assert float(line["train_elbo"]) == pytest.approx(np.mean(own))
    assert float(line["train_elbo_se"]) == pytest.approx(np.std(own, ddof=1) / math.sqrt(3))
    assert line["test_source"] == "encoder" and line["steps"] == "5600.0" and line["not_converged"] == "0"
    assert (
        lines["fair", "factorized", ""]["f_vi_from_here"] == "0"
        and lines["fair", "continued", "256"]["f_vi_from_here"] == "3"
    )
    assert lines["published", "amortized", "64"]["diverged"] == "1"
    assert lines["fair", "factorized", ""]["step_to_mse_0.07"] == ""


def test_every_run_is_a_line_of_the_cells(written):
    with (written / "cells.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    trials = [line for line in lines if line["purpose"] == "tuning"]
    assert len(lines) == 48 and len(trials) == 15 and sum(line["guide"] == "continued" for line in lines) == 3
    assert {(line["lr_local"], line["train_elbo"], line["train_seconds"]) for line in trials} == {
        ("0.001", "-300.001", ""), ("0.01", "-300.01", ""), ("0.1", "-300.1", "")
    }  # fmt: skip


def test_both_protocols_share_their_axes():
    section = section_of(make_records())
    low, high = curves.view(section.arms, "elbo")
    assert low < -694 and high > -231
    for draw in (curves.bounds, curves.errors):
        figure = draw.__wrapped__(section, figures.palette(section.labels))
        grid = np.array(figure.axes).reshape(2, 2)
        assert {axes.get_ylim() for axes in grid.flat} == {grid[0, 0].get_ylim()}
        for row in grid:
            assert row[0].get_xlim() == row[1].get_xlim() and row[0].get_xscale() == row[1].get_xscale()


def test_names_at_the_ends_of_lines_do_not_overlap():
    section = section_of(make_records())
    for draw in (curves.opening, curves.bounds):
        figure = draw.__wrapped__(section, figures.palette(section.labels))
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts if text.get_text() and text.get_position()[0] > 1]
            assert len(boxes) >= 5
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_tolerance_that_the_mean_image_passes_is_named():
    assert "tolerance 0.07" in texts(make_records())["A tolerance without meaning"]
    assert "A tolerance without meaning" not in texts(make_records(datasets=("fashionmnist",)))


def test_checks_that_held_are_one_line():
    (part,) = document(make_records()).sections
    (held,) = [finding for finding in part.findings if finding.kind == "check"]
    assert "constant ≤ A-VI ≤ F-VI holds within the errors (fair)" in held.text
    assert "the mean image's: +0.0% (published) and" in held.text and "85% below the mean image's" in held.text
    records = make_records()
    for record in results_of(records):
        record["result"]["mean_image_mse"]["train"] = 0.06
    assert "differs by +12.5% (published) and" in texts(records)["Constant guide and mean image"]


@pytest.mark.parametrize(("error", "told"), [(0.066, "is 2% below"), (0.0682, "is not below")])
def test_a_collapsed_model_is_called_so(error, told):
    records = make_records(guides=GUIDES[:2])
    for record in results_of(records):
        record["result"]["final"]["train"]["mse"] = error
    found = texts(records)["The model has collapsed"]
    assert told in found and "no guide can show a gap" in found and "-" not in found.replace("A-VI", "")


def test_a_diverged_cell_is_named_and_left_out_of_the_means():
    records = with_a_diverged_cell(make_records())
    assert "A-VI k=64, published, seed 1954, at step 400" in texts(records)["Diverged"]
    arm = section_of(records).arm("published", "A-VI k=64")
    assert arm.mean("final", "train", "elbo").seeds == 2
    reached = {seed: cell.passage("train_mse", 0.08).reached for seed, cell in arm.cells.items()}
    assert reached == {1789: True, 1790: True, 1954: False}


def test_learning_rates_at_the_edge_of_all_that_were_tried_are_told():
    assert "Learning rates at the edge of those tried" not in texts(make_records())
    (tuning, *_) = section_of(make_records()).arm("fair", "F-VI").tuning
    # A wider grid does away with the edge of a narrow one.
    narrow = make_tuning(tuning.record["settings"], rates=(1e-3, 1e-2))
    records = {key: record for key, record in make_records().items() if key != tuning.record["key"]}
    records |= {narrow["key"]: narrow}
    assert texts(records)["Learning rates at the edge of those tried"] == "F-VI chose the largest local rate, 0.01."
    more = make_tuning(tuning.record["settings"], rates=(1e-1,))
    assert "Learning rates at the edge of those tried" not in texts(records | {more["key"]: more})
    arm = section_of(records | {more["key"]: more}).arm("fair", "F-VI")
    assert arm.tuning_seconds == 5.0 and section_of(records).arm("published", "F-VI").tuning == ()


def test_cells_that_were_to_be_compiled_and_were_not_are_told(tmp_path):
    records = make_records(seeds=(1, 2), guides=GUIDES[:1])
    drawn = report.document("images", saved(records, tmp_path))
    assert "Not compiled" not in {finding.title for finding in drawn.findings}
    record = next(iter(records.values()))
    record["provenance"] |= {"fallbacks": ["The training step is evaluated eagerly: no disk."]}
    drawn = report.document("images", saved(records, tmp_path))
    (told,) = [finding for finding in drawn.findings if finding.title == "Not compiled"]
    assert told.kind == "warning" and f"1 of {len(records)} cells" in told.text and "no disk" in told.text


def test_sections_keep_settings_apart_and_not_lengths():
    records = make_records() | make_records(noise="fixed") | make_records(latent_dim=2)
    assert [section.name for section in document(records).sections] == [
        "mnist-dense-fixed", "mnist-dense-learned", "mnist-dense-learned-2",
    ]  # fmt: skip


def test_the_fair_protocol_alone_lacks_nothing():
    assert "Incomplete" in texts(make_records(protocols=("published",)))
    assert "Incomplete" not in texts(make_records(protocols=("fair",)))


@pytest.mark.parametrize(("change", "told"), [({"lr_local": 0.1}, "lr_local 0.1"), ({"steps": 500}, "steps 500")])
def test_cells_trained_in_another_way_are_named_not_mixed_in(change, told):
    other = make_record(make_settings(guide="constant", protocol="fair", seed=1, **change))
    records = make_records() | {other["key"]: other}
    assert "constant (fair) at" in texts(records)["Also in the store"] and told in texts(records)["Also in the store"]
    assert list(section_of(records).arm("fair", "constant").cells) == sorted(SEEDS)


@pytest.mark.parametrize(
    ("records", "told", "opening"),
    [
        (make_records(protocols=("published",)), {"Incomplete": "No record of the fair protocol"}, "not converged"),
        (make_records(guides=GUIDES[:1]), {"Incomplete": "F-VI (fair)"}, "no seed of both"),
        (
            make_records(guides=GUIDES[-1:], protocols=("fair",)),
            {"Incomplete": "the constant guide (fair)"},
            "no seed of both",
        ),
        (make_records(guides=GUIDES[1:2] + GUIDES[-1:]), {"Not converged, published": "F-VI"}, "≥ A-VI k=1 "),
        (
            make_records(guides=GUIDES[1:4], protocols=("fair",)),
            {"Incomplete": "F-VI (fair)"},
            "what it saves is unknown",
        ),
        (make_records(seeds=(1,), guides=GUIDES[2:3]), {"Incomplete": "One seed"}, "no seed of both"),
        (make_records(seeds=(1,)), {"Incomplete": "One seed"}, "1 seed."),
        (
            with_a_diverged_cell(make_records(seeds=(1954,), guides=GUIDES[2:3])),
            {"Diverged": "seed 1954"},
            "no seed of both",
        ),
        (unfinished(make_records()), {"Not converged, fair": "F-VI"}, "not converged"),
    ],
    ids=[
        "one protocol",
        "constant alone",
        "F-VI alone",
        "narrow",
        "continued alone",
        "one guide",
        "one seed",
        "none",
        "most",
    ],
)
def test_part_of_a_sweep_is_drawn_and_says_what_is_missing(records, told, opening):
    found = texts(records)
    for title, text in told.items():
        assert text in found[title]
    drawn = document(records)
    assert opening in drawn.findings[0].text.lower().replace("a-vi", "A-VI")
    assert all(figure.png.startswith(b"\x89PNG") for figure in drawn.drawings.values())
    assert "nan" not in pages.render("summary.md", drawn) + pages.terminal(drawn)


def test_records_of_before_convergence_was_recorded_are_drawn():
    records = make_records()
    for record in records.values():
        for name in ("share", "continued"):
            record["settings"].pop(name, None)
        for name in ("convergence", "continued"):
            record["result"].pop(name, None)
    drawn = document(records)
    assert "Whether these have converged is not recorded." in drawn.findings[0].text
    assert claim(records, "fair", "end of training")["reaches F-VI?"] == "not converged"
    assert "Not converged, fair" not in texts(records)


def test_tuning_alone_is_no_result_yet():
    records = {key: record for key, record in make_records().items() if record["settings"]["purpose"] == "tuning"}
    assert "tuning cells alone" in document(records).findings[0].text
    assert pages.render("report.html", document(records))


def test_a_color_image_keeps_its_colors():
    records = make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",))
    noise = np.random.default_rng(0).uniform(size=(5, 3 * 32 * 32)).tolist()
    for record in results_of(records):
        record["result"]["images"] = {"shape": [3, 32, 32], "originals": noise, "reconstructions": noise}
    figure = next(figure for figure in document(records).sections[0].figures if figure.name == "reconstructions")
    assert len(figure.png) > 20_000


def test_cells_that_ran_at_once_are_counted():
    records = make_records(seeds=(1,), guides=GUIDES[:3], protocols=("published",))
    for minute, record in enumerate(records.values()):
        record["provenance"]["started"] = f"2026-01-05T10:00:{min(minute, 1) * 20:02d}+00:00"
    assert "Up to 3 cells" in document(records).method[-1]
    for minute, record in enumerate(records.values()):
        record["provenance"]["started"] = f"2026-01-05T10:{minute:02d}:00+00:00"
    assert "Up to 1 cell " in document(records).method[-1]


def test_a_record_without_a_field_is_named():
    records = make_records(seeds=(1,), guides=GUIDES[:1])
    key = results_of(records)[0]["key"]
    del records[key]["result"]["final"]
    with pytest.raises(report.ReportError, match=f"Expected result.final.* in the record '{key}'"):
        document(records)


@pytest.mark.parametrize("records", [make_records(), unfinished(make_records()), make_records(seeds=(1,))])
def test_the_terminal_needs_a_hundred_columns(records):
    printed = pages.terminal(document(records))
    assert max(map(len, printed.splitlines())) <= 100
    assert "nats a row" in printed and "F-VI from k=256" in printed or "Not converged" in printed


def test_the_tables_of_the_page_fit_a_laptop():
    drawn = document(make_records(datasets=("mnist", "fashionmnist")))
    for table in (drawn.overview, drawn.sections[0].tables[0]):
        widest = [max(len(cell) for cell in column) for column in zip(*table.rows, strict=True)]
        # 7 pixels a character and 16 between columns, of 1040.
        assert sum(widest) * 7 + len(widest) * 16 <= 1040


@pytest.mark.parametrize(
    ("mean", "text"),
    [
        (Mean(-24.3891, 0.0301, 2), "-24.39 ± 0.03"),
        (Mean(0.0739180, 0.0000030, 2), "0.073918 ± 0.000003"),
        (Mean(-13.4, 1.42, 2), "-13.4 ± 1.4"),
        (Mean(5120.4, 33.3, 3), "5,120 ± 33"),
        (Mean(1.0, math.nan, 1), "1"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(mean, text):
    assert with_error(mean) == text


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
    code = "import sys, experiments.report, experiments.sweeps.images.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[4]).returncode == 0
