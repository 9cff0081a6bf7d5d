"""Figures, claims and their intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dpo_train.findings import Estimate
from dpo_train.recipes.results import (
    RESULTS_JSON,
    RESULTS_MD,
    Claim,
    Figure,
    Point,
    Results,
    Series,
    above_at_equal,
    at_equal,
    over_seeds,
    student_95,
    write,
)


def estimate(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=50)


def point(x: float, y: float, half: float = 0.1) -> Point:
    return Point(label=f"at {x:g}", x=estimate(x), y=estimate(y, half))


LINE = (point(4, 2.0, 0.4), point(0, 0.0, 0.3), point(2, 1.0, 0.3))


def test_a_line_is_read_between_its_neighbours_only() -> None:
    found = at_equal(3.0, LINE)

    assert found is not None
    assert found.value == pytest.approx(1.5)
    assert found.high - found.value == pytest.approx((0.3 + 0.4) / 2)
    assert at_equal(4.5, LINE) is None
    assert at_equal(-0.1, LINE) is None


def test_a_method_is_compared_at_its_own_places() -> None:
    """And no surer for having many points on the same prompts."""
    below = [point(1, 0.1), point(3, 1.1), point(9, 5.0)]
    (claim,) = above_at_equal("DPO", LINE, below, method="PPO", x="KL")

    assert claim.text == "DPO above PPO at equal KL (mean over 2 of 3 points)"
    assert claim.found.value == pytest.approx(0.4)
    assert claim.found.low == pytest.approx(0.4 - (math.hypot(0.1, 0.3) + math.hypot(0.1, 0.35)) / 2)
    assert above_at_equal("DPO", LINE, [point(9, 5.0)], method="PPO", x="KL") == []


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, "holds"), (-0.3, -0.1, "does not hold"), (-0.1, 0.3, "not decided")]
)
def test_a_claim_holds_with_its_whole_interval_or_not(low: float, high: float, expected: str) -> None:
    assert Claim(text="", found=Estimate(value=(low + high) / 2, low=low, high=high, n=9)).verdict == expected


def test_the_spread_between_seeds_is_that_of_all_groups() -> None:
    groups = [[estimate(1.0), estimate(1.2)], [estimate(5.0), estimate(5.0)], [estimate(2.0), estimate(2.4)]]
    found = over_seeds(groups)

    spread = math.sqrt((2 * 0.1**2 + 0 + 2 * 0.2**2) / 3)
    assert [one.value for one in found] == pytest.approx([1.1, 5.0, 2.2])
    expected = math.hypot(0.1, student_95(3) * spread / math.sqrt(2))
    assert [one.high - one.value for one in found] == pytest.approx([expected] * 3)
    assert [one.high - one.value for one in over_seeds([[estimate(1.0)], [estimate(9.0)]])] == pytest.approx([0.1, 0.1])


def test_the_spread_may_grow_with_what_is_measured() -> None:
    small, large = over_seeds([[estimate(0.1), estimate(0.2)], [estimate(9.0), estimate(11.0)]], relative=True)

    spread = math.sqrt((2 * 0.05**2 + 2 * 0.1**2) / 2)
    factor = student_95(2) / math.sqrt(2)
    assert small.high - small.value == pytest.approx(math.hypot(0.1, factor * spread))
    assert large.high - large.value == pytest.approx(math.hypot(0.1, factor * spread * 10))


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (8, 2.306), (30, 2.042)])
def test_students_quantile(freedom: int, expected: float) -> None:
    assert student_95(freedom) == pytest.approx(expected, rel=0.02)


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    bad = Point(label="nothing", x=1.0, y=Estimate(value=math.nan, low=math.nan, high=math.nan, n=0))
    figure = Figure(
        name="frontier", title="Reward", x_label="KL", y_label="reward", level=0.5,
        series=(Series(name="DPO", points=LINE), Series(name="other", points=(bad,), is_line=False)),
    )  # fmt: skip
    results = Results(
        recipe="x",
        title="An experiment",
        figures=(figure,),
        claims=(Claim(text="more", found=estimate(1.0)),),
        deviations=("a smaller model",),
        numbers={"KL": estimate(2.0)},
    )
    write(results, tmp_path)

    found = json.loads((tmp_path / RESULTS_JSON).read_text(encoding="utf-8"))
    page = (tmp_path / RESULTS_MD).read_text(encoding="utf-8")
    assert found["claims"][0]["verdict"] == "holds"
    assert found["figures"][0]["series"][1]["points"][0]["y"]["value"] is None
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for told in (
        "![Reward](frontier.png)",
        "| more | 1.000 (0.900 to 1.100) | holds |",
        "- a smaller model",
        "| DPO: at 4 |",
    ):
        assert told in page
