"""The report of the images sweep, drawn from records whose numbers are known."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from experiments import report
from experiments.reporting import pages
from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import STYLE, curves
from experiments.reporting.provenance import made_by
from experiments.reporting.statistics import Mean
from experiments.runner.store import Store
from experiments.sweeps.images.report import document, figures
from experiments.sweeps.images.report.tables import guides
from tests.experiments.sweeps.images.records import (
    GUIDES,
    MEAN_IMAGE,
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
    return report.draw("images", out)[0].parent


def test_the_page_is_one_file_that_asks_for_nothing_else(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list((written / "figures").glob("*.png"))) == 5
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
    section = "mnist-dense-decoder-learned-noise-64-latents"
    assert {re.sub(r"^\d+-", "", figure.name) for figure in found} == {
        "opening.png", f"{section}-elbo.png", f"{section}-mse.png", f"{section}-published-reconstructions.png",
        f"{section}-fair-reconstructions.png",
    }  # fmt: skip
    assert all(2_000 < figure.stat().st_size < 100_000 for figure in found)


def test_markdown_links_to_every_figure(written):
    linked = re.findall(r"\]\((figures/[^)]+)\)", (written / "summary.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (written / "figures").iterdir())


def test_summary_holds_the_numbers_of_the_records(written):
    with (written / "summary.csv").open(encoding="utf-8") as file:
        lines = {(line["protocol"], line["guide"]): line for line in csv.DictReader(file)}
    assert len(lines) == 11
    line = lines["fair", "A-VI k=64"]
    fair = {width: results_of(make_records(), guide="amortized", width=width, protocol="fair") for width in (64, 256)}
    own = [record["result"]["final"]["train"]["elbo"] for record in fair[64]]
    further = [record["result"]["continued"]["final"]["train"]["elbo"] for record in fair[256]]
    assert float(line["joint_gap"]) == pytest.approx(np.mean(further) - np.mean(own))
    assert float(line["train_elbo"]) == pytest.approx(np.mean(own))
    assert float(line["train_elbo_se"]) == pytest.approx(np.std(own, ddof=1) / math.sqrt(3))
    assert line["steps"] == "5600.0" and line["converged"] == "3 of 3" and line["dataset"] == "mnist"
    assert lines["fair", "F-VI"]["is_f_vi_s"] == "0" and lines["fair", "F-VI from k=256"]["is_f_vi_s"] == "3"
    assert lines["published", "A-VI k=64"]["diverged"] == "1"


def test_every_cell_is_a_line_of_the_cells(written):
    with (written / "cells.csv").open(encoding="utf-8") as file:
        lines = {line["key"]: line for line in csv.DictReader(file)}
    records = with_a_diverged_cell(make_records())
    assert lines.keys() == records.keys() and len(records) == 35
    for record in results_of(records, guide="amortized", width=256, protocol="fair"):
        line, result = lines[record["key"]], record["result"]
        assert float(line["result.final.train.elbo"]) == result["final"]["train"]["elbo"]
        assert float(line["result.continued.final.train.elbo"]) == result["continued"]["final"]["train"]["elbo"]
        assert line["settings.lr_local"] == "0.01" and line["provenance.commit"] == "0123abc"


def test_both_protocols_share_their_axes():
    section = section_of(make_records())
    for shown in (figures.BOUNDS, figures.ERRORS):
        drawn = curves.__wrapped__(figures.panels(section.comparisons, figures.palette([section]), shown))
        grid = np.array(drawn.axes).reshape(2, 2)
        assert {axes.get_ylim() for axes in grid.flat} == {grid[0, 0].get_ylim()}
        for one, other in zip(*grid, strict=True):
            assert one.get_xlim() == other.get_xlim() and one.get_xscale() == other.get_xscale()
        # Where every training ended is in view.
        low, high = grid[0, 0].get_ylim()
        ends = [run.curve[y][-1] for _, y in shown for arm in section.arms for run in arm.runs.values()]
        assert all(low < end < high for end in ends if math.isfinite(end))


def test_every_guide_is_named_once_beside_the_panels():
    section = section_of(make_records())
    for shown, comparisons in ((figures.BOUNDS[1:], section.comparisons[1:]), (figures.BOUNDS, section.comparisons)):
        with matplotlib.rc_context(fname=STYLE):
            drawn = curves.__wrapped__(figures.panels(comparisons, figures.palette([section]), shown))
            drawn.draw_without_rendering()
        (legend,) = drawn.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert names == ["constant", "A-VI k=1", "A-VI k=64", "A-VI k=256", "F-VI", "F-VI from k=256"]
        assert len({line.get_color() for line in legend.get_lines()}) == len(names)
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawn.bbox.x1 and not any(box.overlaps(axes.bbox) for axes in drawn.axes)


def test_what_holds_is_not_told():
    assert not texts(make_records(protocols=("fair",)))


def test_the_error_of_the_mean_image_is_a_line_of_the_figure():
    (section,) = map(section_of, [make_records(protocols=("fair",))])
    ((train, test),) = figures.panels(section.comparisons, figures.palette([section]), figures.ERRORS)
    assert (train.level, test.level) == pytest.approx(MEAN_IMAGE["mnist"]) and train.named == "mean image"


def test_a_diverged_cell_is_named_and_left_out_of_the_means():
    records = with_a_diverged_cell(make_records())
    assert texts(records)["Diverged, left out"] == "A-VI k=64 (published), seed 1954, step 400"
    arm = section_of(records).comparisons[0].arms["A-VI k=64"]
    assert arm.mean("final", "train", "elbo").seeds == 2
    there = {seed: not run.until(-1e4, "step").censored for seed, run in arm.runs.items()}
    assert there == {1789: True, 1790: True, 1954: False}


def test_learning_rates_at_the_edge_of_all_that_were_tried_are_told():
    assert "Learning rates at the edge of those tried" not in texts(make_records())
    (tuning, *_) = section_of(make_records()).comparisons[1].arms["F-VI"].tunings
    # A wider grid does away with the edge of a narrow one.
    narrow = make_tuning(tuning.record["settings"], rates=(1e-3, 1e-2))
    records = {key: record for key, record in make_records().items() if key != tuning.record["key"]}
    records |= {narrow["key"]: narrow}
    assert texts(records)["Learning rates at the edge of those tried"] == "F-VI: lr_local 0.01 of 0.001 to 0.01"
    more = make_tuning(tuning.record["settings"], rates=(1e-1,))
    assert "Learning rates at the edge of those tried" not in texts(records | {more["key"]: more})
    lines = guides(section_of(records | {more["key"]: more})).values
    seconds = {line["protocol"]: line["tuning s"] for line in lines if line["guide"] == "F-VI"}
    assert seconds == {"published": None, "fair": 5.0}


def test_cells_that_were_to_be_compiled_and_were_not_are_told(tmp_path):
    records = make_records(seeds=(1, 2), guides=GUIDES[:1])
    drawn = report.document("images", saved(records, tmp_path))
    assert "Not compiled" not in {note.title for note in drawn.notes}
    record = next(iter(records.values()))
    record["provenance"] |= {"fallbacks": ["The training step is evaluated eagerly: no disk."]}
    drawn = report.document("images", saved(records, tmp_path))
    (told,) = [note for note in drawn.notes if note.title == "Not compiled"]
    assert told.kind == "warning" and f"1 of {len(records)} cells" in told.text and "no disk" in told.text


def test_sections_keep_settings_apart_and_not_lengths():
    records = make_records() | make_records(noise="fixed") | make_records(latent_dim=2)
    assert [part.title for part in document(records).parts[:-1]] == [
        "MNIST, dense decoder, fixed noise, 64 latents", "MNIST, dense decoder, learned noise, 2 latents",
        "MNIST, dense decoder, learned noise, 64 latents",
    ]  # fmt: skip
    # Those that differ in what the title does not show are no less apart.
    drawn = document(make_records() | make_records(hidden_dim=32))
    assert len({drawn.names[part] for part in drawn.parts}) == len(drawn.parts) == 3


@pytest.mark.parametrize(("change", "told"), [({"lr_local": 0.1}, "lr_local 0.1"), ({"steps": 500}, "steps 500")])
def test_cells_trained_in_another_way_are_named_not_mixed_in(change, told):
    other = make_record(make_settings(guide="constant", protocol="fair", seed=1, **change))
    records = make_records() | {other["key"]: other}
    said = texts(records)["Trained in another way, left out"]
    assert "constant (fair) at" in said and told in said
    assert list(section_of(records).comparisons[1].arms["constant"].runs) == sorted(SEEDS)


@pytest.mark.parametrize(
    ("records", "told", "opening"),
    [
        (make_records(protocols=("published",)), {}, "not converged"),
        (make_records(guides=GUIDES[:1]), {}, "no seed of both"),
        (make_records(guides=GUIDES[-1:], protocols=("fair",)), {}, "no seed of both"),
        (make_records(guides=GUIDES[1:2] + GUIDES[-1:]), {"Not converged": "F-VI (published)"}, "≥ A-VI k=1 "),
        (make_records(guides=GUIDES[1:4], protocols=("fair",)), {}, "f-vi - s (ratio unknown)"),
        (make_records(seeds=(1,), guides=GUIDES[2:3]), {}, "no seed of both"),
        (make_records(seeds=(1,)), {}, "seeds: 1."),
        (
            with_a_diverged_cell(make_records(seeds=(1954,), guides=GUIDES[2:3])),
            {"Diverged, left out": "seed 1954"},
            "no seed of both",
        ),
        (unfinished(make_records()), {"Not converged": "F-VI (fair)"}, "not converged"),
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
    assert opening in drawn.notes[0].text.lower().replace("a-vi k", "A-VI k")
    assert all(figure.png.startswith(b"\x89PNG") for part in drawn.walk() for figure in part.drawings)
    assert "nan" not in pages.render("summary.md", drawn) + pages.terminal(drawn)


def test_records_of_before_convergence_was_recorded_are_drawn():
    records = make_records()
    for record in records.values():
        for name in ("share", "continued"):
            record["settings"].pop(name, None)
        for name in ("convergence", "continued"):
            record["result"].pop(name, None)
    drawn = document(records)
    assert "Not converged; the last half of the steps changed F-VI - nats a row" in drawn.notes[0].text
    assert claim(records, "fair", "end of training")["reaches F-VI?"] == "not converged"
    assert "Not converged" not in texts(records)


def test_tuning_alone_is_no_result_yet():
    records = {key: record for key, record in make_records().items() if record["settings"]["purpose"] == "tuning"}
    assert "tuning cells alone" in document(records).notes[0].text
    assert pages.render("report.html", document(records))


def test_a_color_image_keeps_its_colors():
    records = make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",))
    noise = np.random.default_rng(0).uniform(size=(5, 3 * 32 * 32)).tolist()
    for record in results_of(records):
        record["result"]["images"] = {"shape": [3, 32, 32], "originals": noise, "reconstructions": noise}
    figure = next(figure for figure in document(records).parts[0].figures if figure.name == "fair reconstructions")
    assert len(figure.png) > 20_000


def test_cells_that_ran_at_once_and_mixed_ones_are_told(tmp_path):
    records = make_records(seeds=(1,), guides=GUIDES[:3], protocols=("published",))
    assert "ran at once" in made_by(records).tables[0].note
    assert "Mixed" not in {note.title for note in report.document("images", saved(records, tmp_path)).notes}
    first, second, _ = records.values()
    first["provenance"]["commit"], second["provenance"]["machine"]["processor"] = "89abcdef", "other"
    (told,) = [note for note in report.document("images", saved(records, tmp_path)).notes if note.title == "Mixed"]
    assert told.kind == "warning" and "Commits: 2, kinds of machine: 2." in told.text
    assert [line["cells"] for line in made_by(records).tables[0].values] == [1, 1, 1]


def test_a_record_without_a_field_is_named():
    records = make_records(seeds=(1,), guides=GUIDES[:1])
    key = results_of(records)[0]["key"]
    del records[key]["result"]["final"]
    with pytest.raises(report.ReportError, match=f"Expected result.final.* in the record '{key}'"):
        document(records)


def test_names_from_records_are_no_paths_and_no_markup(tmp_path):
    name = "../../<script>alert(1)</script>|x"
    records = make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",), dataset=name, datasets=(name,))
    page = pages.save(document(records), tmp_path / "a" / "b")
    found = {path.relative_to(page.parent).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found >= {"report.html", "summary.md", "summary.csv"} and len(found) == 7
    assert all(re.fullmatch(r"figures/[a-z0-9-]+\.png|report\.html|summary\.\w+", path) for path in found)
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_figures_of_the_same_name_are_kept_apart():
    one, other = (Figure("../same", "Same", "", lambda: b"") for _ in range(2))
    drawn = Document("Report", notes=[Note("answer", "So.", figure=one)], figures=[other])
    assert drawn.names[one] != drawn.names[other] and "/" not in drawn.names[one] + drawn.names[other]


def test_a_page_is_replaced_whole(tmp_path, monkeypatch):
    drawn = Document("Old", notes=[Note("answer", "So.")])
    page = pages.save(drawn, tmp_path)
    before = page.read_bytes()
    (tmp_path / "report.html.dead.tmp").write_bytes(b"of a killed process")
    replace = os.replace

    def killed(source, target):
        # All of the new page is there before the old one goes, under another name of the same folder.
        if Path(target) == page:
            assert "New" in Path(source).read_text() and Path(source).parent == tmp_path and page.read_bytes() == before
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(report.ReportError, match="No space left"):
            pages.save(Document("New"), tmp_path)
    assert page.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    assert b"New" in pages.save(Document("New"), tmp_path).read_bytes()


@pytest.mark.parametrize("records", [make_records(), unfinished(make_records()), make_records(seeds=(1,))])
def test_the_terminal_needs_a_hundred_columns(records):
    printed = pages.terminal(document(records))
    assert max(map(len, printed.splitlines())) <= 100
    assert "nats a row" in printed and "F-VI from k=256" in printed or "Not converged" in printed


def test_the_tables_of_the_page_fit_a_laptop():
    drawn = document(make_records(datasets=("mnist", "fashionmnist")))
    for table in (drawn.tables[0], drawn.parts[0].tables[0]):
        lines = [line for lines in table.groups for line in lines]
        widest = [max(len(cell) for cell, _ in column) for column in zip(*lines, strict=True)]
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
    assert str(mean) == text


def test_command_line_prints_the_table_and_the_place(tmp_path, capsys):
    saved(make_records(seeds=(1,), guides=GUIDES[:1], protocols=("fair",)), tmp_path)
    assert report.main(["images", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert report.draw("images", tmp_path)[1] in printed
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
    (tmp_path / "images" / "report").unlink()
    next((tmp_path / "images" / "cells").glob("*.json")).write_text("{")
    assert report.main(["images", "--out", str(tmp_path)]) == 0
    assert "1 files are damaged or foreign, and no numbers are taken" in capsys.readouterr().out.replace("\n", " ")


def test_the_report_does_not_load_what_trains():
    code = "import sys, experiments.report, experiments.sweeps.images.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[4]).returncode == 0
