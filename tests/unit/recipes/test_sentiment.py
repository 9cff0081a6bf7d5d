"""From a sweep's trials to dots in the plane of KL and reward. Numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_train.evaluate.trials import Point, Trial
from dpo_train.findings import Estimate
from dpo_train.recipes.sentiment import ends, trial_dots


def trial(beta: float, seed: int, *, steps: tuple[int, ...] = (12, 24)) -> Trial:
    """Its KL is its steps over 24 beta, a tenth more with seed 1; its reward is half of that."""
    points = []
    for step in steps:
        kl = step / 24 / beta * (1 + 0.1 * seed)
        estimates = {
            name: Estimate(value=value, low=0.0, high=9.0, n=4) for name, value in (("kl", kl), ("reward", kl / 2))
        }
        deviations = dict.fromkeys(estimates, (0.01, -0.01, 0.02, -0.02))
        points.append(Point(step=step, **estimates, deviations=deviations))
    return Trial(name=f"{beta},{seed}", parameters={"beta": beta}, seed=seed, steps=24, points=tuple(points))


def test_a_dot_is_a_setting_and_step_over_its_seeds() -> None:
    notes: list[str] = []
    dots = trial_dots({"DPO": ([trial(beta, seed) for beta in (0.5, 1.0) for seed in (0, 1)], None)}, notes)["DPO"]

    assert [dot.label for dot in dots] == [f"DPO beta {b}, step {s}" for b in ("0.5", "1") for s in (12, 24)]
    assert [dot.x.value for dot in dots] == pytest.approx([1.05, 2.1, 0.525, 1.05])
    assert [dot.y.value for dot in dots] == pytest.approx([0.525, 1.05, 0.2625, 0.525])
    # Seeds move KLs in proportion to them, and rewards by the root.
    assert dots[1].x.between == pytest.approx(4 * dots[2].x.between)
    assert dots[1].y.between == pytest.approx(2 * dots[2].y.between)
    assert [dot.step for dot in ends(dots)] == [24, 24]
    assert notes == []


def test_a_training_that_failed_is_told_and_no_end() -> None:
    """One seed of beta 0.5 diverged, and the only one of beta 1 on its way."""
    lost = [
        replace(trial(0.5, 1, steps=(12,)), failure="loss nan"),
        replace(trial(1.0, 0, steps=(12,)), failure="killed"),
    ]
    notes: list[str] = []
    dots = trial_dots({"DPO": ([trial(0.5, 0), *lost], None)}, notes)["DPO"]

    assert [dot.label for dot in ends(dots)] == ["DPO beta 0.5, step 24"]
    assert [note.split(": ")[1] for note in notes] == ["loss nan", "killed"]
    assert ends([]) == []
