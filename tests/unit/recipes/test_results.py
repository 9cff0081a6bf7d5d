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
    write,
)


def estimate(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=50)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, "holds"), (-0.3, -0.1, "does not hold"), (-0.1, 0.3, "not decided")]
)
def test_a_claim_holds_with_its_whole_interval_or_not(low: float, high: float, expected: str) -> None:
    assert Claim(text="", found=Estimate(value=(low + high) / 2, low=low, high=high, n=9)).verdict == expected


def test_what_is_written_is_whole(tmp_path: Path) -> None:
    bad = Point(label="nothing", x=1.0, y=Estimate(value=math.nan, low=math.nan, high=math.nan, n=0))
    line = tuple(Point(label=f"at {x}", x=estimate(x), y=estimate(x / 2)) for x in (4, 0, 2))
    figure = Figure(
        name="frontier", title="Reward", x_label="KL", y_label="reward", level=0.5,
        series=(Series(name="DPO", points=line), Series(name="other", points=(bad,), is_line=False)),
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
