"""The sweep's picture: where settings stand, what the frontier is, and that its files hold what they should."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train.config import SelectConfig
from dpo_train.evaluate.frontier import FRONTIER_HTML, FRONTIER_PNG, write_frontier
from dpo_train.evaluate.frontier_picture import KL, METRICS, limits, picture
from dpo_train.evaluate.report_rows import number
from dpo_train.evaluate.trials import Point, Trial, select
from dpo_train.evaluate.trials_file import TRIALS_FILE, from_dict
from tests.unit.evaluate.sweeps import CONFIG, estimate, sweep, trial


def written(trials: list[Trial], folder: Path, config: SelectConfig = CONFIG) -> str:
    write_frontier(trials, select(trials, config), config, folder)
    return (folder / FRONTIER_HTML).read_text()


def test_frontier_is_what_no_setting_within_the_budget_beats_at_a_smaller_kl() -> None:
    """By KL: 1.0, 0.5, 0.1 and 0.05 rise from 0.60 to 0.83; 0.02 has as much as 0.05 at more KL, and 0.01 is over the
    budget."""
    trials = sweep()
    drawn = picture(trials, select(trials, CONFIG), CONFIG)

    assert [mark.name for mark in drawn.marks if mark.is_frontier] == ["beta=1", "beta=0.5", "beta=0.1", "beta=0.05"]
    assert [mark.name for mark in drawn.marks if not mark.is_within] == ["beta=0.01"]
    assert [mark.name for mark in drawn.marks if mark.is_chosen] == ["beta=0.05"]
    assert (drawn.x_label, drawn.budget) == (KL, 12)


def test_seeds_stand_beside_their_mean() -> None:
    """beta 0.1: KL 3.4 and 2.9, accuracy 0.82 and 0.80; the mark at (3.15, 0.81)."""
    (mark,) = [mark for mark in picture(sweep(), None, CONFIG).marks if mark.name == "beta=0.1"]

    assert mark.seeds == ((3.4, 0.82), (2.9, 0.80))
    assert (mark.x.value, mark.y.value) == (pytest.approx(3.15), pytest.approx(0.81))


def test_curves_show_stopped_trials_too() -> None:
    """The trial that halving stopped has no mark, and a curve; the failed one has neither a mark nor a point."""
    drawn = picture(sweep(), None, CONFIG)
    curves = {curve.name: curve for curve in drawn.curves}

    assert curves["beta=0.2"].steps == (20, 40, 80)
    assert curves["beta=0.005"].steps == ()
    assert curves["beta=0.1"].has_seeds
    assert curves["beta=0.1"].accuracy[0].value == pytest.approx(0.5 + 0.4 * 0.31)
    assert "beta=0.2" not in {mark.name for mark in drawn.marks}


def test_way_of_a_setting_follows_its_kl() -> None:
    """Where KL and accuracy were measured on the way: through both to the end."""
    points = (
        Point(step=10, accuracy=estimate(0.6), kl=estimate(1.0)),
        Point(step=20, accuracy=estimate(0.65)),
        Point(step=40, accuracy=estimate(0.7), kl=estimate(2.0)),
    )

    (way,) = picture([trial(0.1, 70, 2.0, points=points)], None, CONFIG).ways

    assert (way.steps, way.is_stopped, way.has_seeds) == ((10, 40), False, False)
    assert [(kl.value, found.value) for kl, found in zip(way.kl, way.metric, strict=True)] == [(1.0, 0.6), (2.0, 0.7)]


def test_ways_of_seeds_are_one_with_a_band_and_stopped_ones_end_without_a_mark() -> None:
    """beta 0.1 after 20 steps: KL 0.4 * 3.4 and 0.4 * 2.9, accuracies 0.5 + 0.4 * 0.32 and 0.5 + 0.4 * 0.30, and an
    interval wider than each seed's. The trial that halving stopped is there, the failed one is not."""
    drawn = picture(sweep(), None, CONFIG)
    ways = {way.name: way for way in drawn.ways}

    seeds = ways["beta=0.1"]
    assert seeds.has_seeds
    assert (seeds.kl[0].value, seeds.metric[0].value) == (pytest.approx(0.4 * 3.15), pytest.approx(0.624))
    assert seeds.metric[0].high - seeds.metric[0].low > 0.12
    assert [name for name, way in ways.items() if way.is_stopped] == ["beta=0.2"]
    assert "beta=0.005" not in ways
    assert min(kl.value for kl in drawn.all_x) == pytest.approx(0.4 * 0.05)


def test_one_rung_is_a_way_of_what_was_stopped_there_alone() -> None:
    """Of a trial that came to its end the mark shows as much. Where rewards select, accuracies have no place."""
    once = (Point(step=40, accuracy=estimate(0.7), kl=estimate(2.0)),)
    trials = [trial(0.1, 70, 2.0, points=once), trial(0.5, 70, 2.0, points=once, stopped="at step 40")]

    assert [way.name for way in picture(trials, None, CONFIG).ways] == ["beta=0.5"]
    assert picture(trials, None, SelectConfig(metric="reward")).ways == ()


@pytest.mark.parametrize(("metric", "values"), [("reward", [-1.5, -0.5]), ("win_rate", [0.5, 0.7])])
def test_ways_and_their_words_are_of_the_metric_that_selects(metric: str, values: list[float], tmp_path: Path) -> None:
    """Reward against KL by step, or win rate, through the steps at which the judge was asked: not the second one."""
    config = SelectConfig(metric=metric)  # type: ignore[arg-type] # one of the three
    found = {"accuracy": estimate(0.6), "kl": estimate(1.0)}
    points = (
        Point(step=10, **found, reward=estimate(-1.5), win_rate=estimate(0.5)),
        Point(step=20, **found),
        Point(step=40, accuracy=estimate(0.7), kl=estimate(2.0), reward=estimate(-0.5), win_rate=estimate(0.7)),
    )
    of_end = {"reward": estimate(-0.5), "win_rate": estimate(0.7)}
    one = trial(0.1, 70, 2.0, points=points, **of_end)
    one = replace(one, deviations=dict.fromkeys(("accuracy", *of_end), one.deviations["accuracy"]))

    drawn = picture([one], None, config)

    (way,) = drawn.ways
    assert [(step, kl.value) for step, kl in zip(way.steps, way.kl, strict=True)] == [(10, 1.0), (40, 2.0)]
    assert [value.value for value in way.metric] == values
    assert [mark.y.value for mark in drawn.marks] == values[1:]
    label = METRICS[metric]
    page = written([one], tmp_path, config)
    for step, kl, value in zip((10, 40), ("1.000", "2.000"), values, strict=True):
        assert f"step {step}: {label} {number(value)}, KL {kl}" in page
        assert re.search(rf"step {step}</span>\s+{label} {number(value)}, KL {kl}</li>", page)


def test_without_kl_settings_stand_side_by_side() -> None:
    """In the order of their names, with no frontier and no budget."""
    trials = [trial(beta, 70, None) for beta in (0.5, 0.1)]

    drawn = picture(trials, None, SelectConfig())

    assert [(mark.name, mark.x.value) for mark in drawn.marks] == [("beta=0.1", 1), ("beta=0.5", 2)]
    assert not any(mark.is_frontier for mark in drawn.marks)
    assert drawn.budget is None


def test_colour_is_beta_and_shape_is_the_rest() -> None:
    """Two betas and two losses: four looks of two colours and two shapes."""
    trials = [trial(beta, 70, 2.0, parameters={"loss": loss}) for beta in (0.1, 0.5) for loss in ("ipo", "sigmoid")]

    drawn = picture(trials, None, CONFIG)

    assert [words for words, _ in drawn.colours] == ["beta=0.1", "beta=0.5"]
    assert drawn.shapes == (("loss=ipo", "o"), ("loss=sigmoid", "s"))
    looks = drawn.looks
    assert looks["beta=0.1,loss=ipo"].colour == looks["beta=0.1,loss=sigmoid"].colour
    assert looks["beta=0.1,loss=ipo"].shape == looks["beta=0.5,loss=ipo"].shape
    assert len(set(looks.values())) == 4


def test_wide_interval_does_not_make_dots_of_the_others() -> None:
    """Values from 1 to 3 with an interval of 100 to each side: half of the values' range more to each side, and 6 %."""
    low, high = limits([estimate(1, 100), estimate(3, 0.1)])

    assert (low, high) == (pytest.approx(0 - 0.24), pytest.approx(4 + 0.24))


def test_one_value_gets_its_interval_as_range() -> None:
    """0.7 by 0.05 to each side, and 6 %."""
    assert limits([estimate(0.7, 0.05)]) == (pytest.approx(0.644), pytest.approx(0.756))


def test_files_hold_the_sweep(tmp_path: Path) -> None:
    """The JSON gives trials and choice back, and the picture is a PNG of a size to be looked at."""
    trials = sweep()
    choice = select(trials, CONFIG)
    write_frontier(trials, choice, CONFIG, tmp_path)

    content = json.loads((tmp_path / TRIALS_FILE).read_text())
    assert from_dict(content) == (tuple(trials), choice)
    assert content["select"] == {"metric": "accuracy", "max_kl": 12, "max_length_growth": None}
    png = (tmp_path / FRONTIER_PNG).read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    assert min(width, height) >= 600


def test_page_names_every_trial_and_why_it_lost(tmp_path: Path) -> None:
    """The chosen one first; failed and stopped ones last, with their reasons."""
    page = written(sweep(), tmp_path)

    names = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', page)
    assert names[0] == "beta=0.05"
    assert names[-2:] == ["beta=0.2", "beta=0.005"]
    assert len(names) == 10
    for text in (
        "KL 21.000: over the budget of 12 by 9.000",
        "at step 40: 5th of 8 by rewards/accuracy",
        "NonFiniteLossError: step 3, rank 0",
        "another seed of the chosen setting, beta=0.05",
        "reaches over it",
    ):
        assert text in page


def test_page_allows_its_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    """The digests in the policy are those of the one script and the one style; there is no address in it."""
    page = written(sweep(), tmp_path)

    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page, re.DOTALL)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert re.findall(r"https?://|src=|href=|style=|onerror", page) == []


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Markup, formulas and letters without a glyph in names, values and reasons."""
    evil = "</script><script>alert(1)</script>$x^$\u202e"
    one = trial(0.1, 70, 2.0, parameters={"loss": evil})
    broken = replace(one, name=f"{evil}2", parameters={"beta": 0.2, "loss": evil}, failure=evil)

    page = written([one, broken], tmp_path)

    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "[U+202E]" in page


def test_sweep_in_which_nothing_finished_is_drawn_all_the_same(tmp_path: Path) -> None:
    """No choice, no mark, no curve: the page says so and lists what failed."""
    trials = [Trial(name="beta=0.1", parameters={"beta": 0.1}, seed=0, failure="out of memory")]

    write_frontier(trials, None, CONFIG, tmp_path)

    page = (tmp_path / FRONTIER_HTML).read_text()
    assert "No trial could be chosen." in page
    assert "out of memory" in page
    assert (tmp_path / FRONTIER_PNG).stat().st_size > 1000
