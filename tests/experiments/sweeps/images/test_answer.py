"""What the report of the images sweep answers, from records whose numbers are known."""

import math
import re

import numpy as np
import pytest

from experiments.reporting.statistics import Duration, ratio_text
from experiments.sweeps.images.report.claims import compare, levels, table
from experiments.sweeps.images.report.sections import read
from experiments.sweeps.images.report.tables import guides
from tests.experiments.sweeps.images.records import (
    TRUTH,
    make_records,
    replaced,
    results_of,
)
from tests.experiments.sweeps.images.reports import F_VI, answered, claim, section_of, texts, unfinished


def bound_from(section):
    """In how many seeds F-VI's bound is that of each guide, of the fair protocol, by the table."""
    lines = [line for line in guides(section).values if line["protocol"] == "fair"]
    return {line["guide"]: line["is F-VI's"] for line in lines if line["is F-VI's"]}


def test_the_answer_is_made_from_the_numbers():
    found = answered(make_records())
    assert found.kind == "answer"
    assert re.search(r"F-VI \(-23\d\.\d+ ± .*\) ≥ A-VI k=256 \(-23\d\.\d+ ± .*\) ≥ constant \(-690", found.text)
    assert "Amortization costs 7.30 ± 0.04 nats a row; to" in found.text and "seeds: 3." in found.text
    # To the level F-VI takes some 6,400 of its 12,000 steps at .008 s, A-VI some 2,900 of its 4,800 at .006 s.
    assert re.search(r"to A-VI's level A-VI takes 17\.\d s and F-VI 51\.\d s \(ratio 3\.0\)", found.text)


def test_what_has_not_converged_says_what_it_gained_and_what_that_cost():
    records = unfinished(make_records())
    found = answered(records)
    (cell,) = [r["result"]["convergence"] for r in results_of(records, **F_VI, seed=1954)]
    assert found.kind == "warning" and not cell["converged"]
    told = re.search(
        r"Not converged; the last half of the steps changed F-VI \+(\d+) nats a row in ([\d.]+) s\.", found.text
    )
    assert float(told[1]) == pytest.approx(cell["late_gain"], abs=0.5) and float(told[2]) == pytest.approx(16)
    assert "costs" not in found.text and "saves" not in found.text
    assert "F-VI (fair)" in texts(records)["Not converged"].split("; ")
    for record in results_of(records, **F_VI):
        record["result"]["convergence"] |= {"converged": True, "late_gain": -50.0}
    assert "the steps changed F-VI -50 nats a row in" in answered(records).text
    for record in results_of(records, **F_VI):
        record["result"]["convergence"] |= {"converged": True, "late_gain": -0.5}
    assert "Not converged" not in answered(records).text
    for record in results_of(records, **F_VI):
        record["result"]["convergence"] |= {"converged": False, "late_gain": None}
    assert "changed F-VI - nats a row" in answered(records).text


def test_an_answer_that_the_order_contradicts_says_so():
    records = replaced(make_records(), guide="constant", width=None, protocol="fair", how={"elbo": -150.0})
    found = answered(records)
    assert "< constant (-150" in found.text and found.kind == "warning"
    # The published F-VI, which starts from nothing but draws.
    found = answered(make_records(protocols=("published",)))
    assert re.search(r"F-VI \(-6\d\d\.\d.*\) < A-VI k=256 \(-40\d", found.text) and found.kind == "warning"


def test_a_guide_that_saves_nothing_has_a_ratio_below_one():
    records = replaced(make_records(), guide="factorized", protocol="fair", how={"settle": 100})
    line = claim(records, "fair", "equal seconds")
    assert float(line["time, F-VI / A-VI"]) < 1 and line["reaches F-VI?"] == "no" and line["F-VI - A-VI"].value > 0


def test_a_level_that_f_vi_does_not_reach_bounds_the_ratio():
    records = replaced(make_records(), **F_VI, how={"elbo": -300.0})
    found = answered(records)
    assert re.search(r"to A-VI's level A-VI takes 17\.\d s and F-VI > 96 s \(ratio > 5\.6\)", found.text)
    assert claim(records, "fair", "equal seconds")["time, F-VI / A-VI"] == "> 5.6"
    # The bound is still that of the outputs of A-VI, which are F-VI's to start from.
    assert "Amortization costs 7.30" in found.text
    assert bound_from(section_of(records)) == {"F-VI from k=256": 3}


def test_f_vi_is_by_seed_the_best_of_all_it_contains():
    records = make_records()
    for seed, elbo in ((1954, -200.0), (1789, -300.0), (1790, -300.0)):
        records = replaced(records, **F_VI, seeds=[seed], how={"elbo": elbo})
    (cell,) = results_of(records, guide="amortized", width=256, protocol="fair", seed=1790)
    cell["result"]["continued"] |= {"status": "diverged", "diverged_at": 3, "final": None, "convergence": None}
    section = section_of(records)
    _, fair = section.comparisons
    assert {seed: arm.label for seed, arm in fair.starts.items()} == {
        1954: "F-VI", 1789: "F-VI from k=256", 1790: "A-VI k=256"
    }  # fmt: skip
    assert bound_from(section) == {"A-VI k=256": 1, "F-VI": 1, "F-VI from k=256": 1}
    gaps = [fair.joint_gap(arm).value for arm in fair.arms.values()]
    assert min(gaps) >= 0
    # Published, nothing but its own start counts.
    assert {arm.label for arm in section.comparisons[0].starts.values()} == {"F-VI"}


def test_what_no_training_of_f_vi_has_found_is_a_cost_of_nothing():
    records = replaced(make_records(), **F_VI, how={"elbo": -300.0})
    for record in results_of(records, guide="amortized", width=256, protocol="fair"):
        record["result"]["continued"] = None
    assert "Amortization costs 0.00 ± 0.04 nats a row" in answered(records).text
    # Above it, and not by what could be seen.
    records = replaced(records, **F_VI, how={"elbo": -237.93})
    for record, more in zip(results_of(records, **F_VI), (0.5, 0.0, -0.4), strict=True):
        record["result"]["final"]["train"]["elbo"] += more
    assert "Amortization costs 0.2" in answered(records).text


def test_a_continuation_counts_the_steps_and_seconds_of_its_encoder():
    arms = section_of(make_records()).comparisons[1].arms
    encoder, further = (arms[label].runs[1954] for label in ("A-VI k=256", "F-VI from k=256"))
    assert further.curve["step"][0] == encoder.steps == 4800 and further.steps == further.curve["step"][-1] == 7200
    assert further.curve["seconds"][0] == pytest.approx(28.8)
    assert further.curve["elbo"][0] == pytest.approx(encoder.curve["elbo"][-1], abs=1e-6)
    assert further.seconds == pytest.approx(28.8 + 2400 * 0.008)


def test_both_claims_are_answered_by_steps_by_seconds_and_at_convergence():
    records = make_records()
    lines = table(read(records)).values
    assert [(line["protocol"], line["compared at"]) for line in lines] == [
        ("published", "equal steps"), ("published", "equal seconds"), ("published", "end of training"),
        ("fair", "equal steps"), ("fair", "equal seconds"), ("fair", "convergence"),
    ]  # fmt: skip
    at_end = claim(records, "fair", "convergence")
    assert str(at_end["F-VI - A-VI"]) == "7.30 ± 0.04" and at_end["reaches F-VI?"] == "no" and at_end["width"] == 256
    # All seconds: 28.8 of the encoder and 19.2 more.
    assert at_end["time, F-VI / A-VI"] == "1.7"
    assert claim(records, "fair", "equal steps")["time, F-VI / A-VI"] == "2.2"
    assert claim(records, "published", "equal steps")["reaches F-VI?"] == "above"
    assert claim(records, "published", "end of training")["reaches F-VI?"] == "not converged"


def test_equal_steps_and_seconds_are_read_off_the_curves():
    section = section_of(make_records())
    fair = section.comparisons[1]
    best = fair.best(least=64)
    for claimed, step in zip(compare(section, fair, best), (4800, 28.8 / 0.008), strict=False):
        a, f = (TRUTH[guide][0] - 900 * math.exp(-at / TRUTH[guide][1])
                for guide, at in ((("amortized", 256), 4800), (("factorized", None), step)))  # fmt: skip
        assert claimed.gap.value == pytest.approx(f - a, abs=1.5)
    assert np.mean(list(levels(fair, best).values())) == pytest.approx(-238.3 - 0.02 * (690.3 - 238.3), abs=0.5)


def test_what_a_curve_has_reached_does_not_fall():
    records = make_records(seeds=(1954,), protocols=("fair",))
    (record,) = results_of(records, **F_VI)
    record["result"]["curve"] |= {"step": [0, 10, 20, 30], "seconds": [0.0, 1.0, 2.0, 3.0], "elbo_se": [0.1] * 4}
    record["result"]["curve"]["elbo"] = [-100.0, -50.0, -80.0, -40.0]
    cell = section_of(records).comparisons[0].arms["F-VI"].runs[1954]
    assert [cell.at("step", step).value for step in (0, 5, 20, 30, 99)] == [-100.0, -75.0, -50.0, -40.0, -40.0]
    assert cell.at("seconds", 2.5).value == -45.0


@pytest.mark.parametrize(
    ("slow", "fast", "told"),
    [
        ((25, False), (10, False), "2.5"),
        ((5, False), (10, False), "0.50"),
        ((25, True), (10, False), "> 2.5"),
        ((25, False), (10, True), "< 2.5"),
        ((25, True), (10, True), "unknown"),
    ],
)
def test_a_ratio_of_what_was_not_reached_is_a_bound(slow, fast, told):
    assert ratio_text(Duration(*slow), Duration(*fast)) == told
