"""Where trials stand at rungs and ends, and whose policies are kept. Numbers by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_train.config import RunConfig, SelectConfig
from dpo_train.evaluate.trials import Point, Trial
from dpo_train.evaluate.trials_file import point_to_dict, trial_to_dict
from dpo_train.findings import Estimate
from dpo_train.stages.sweep_standing import Standing, over_budget, to_keep
from tests.tiny import tiny_config

SIZES = np.array([2] * 8)
ACCURACY = SelectConfig()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("standing"))


def standing(config: RunConfig, beta: float, seed: int = 0, right: str | None = None) -> Standing:
    """``right``: its trial has come to its end with these pairs right."""
    name = f"beta={beta:g},seed={seed}"
    found = Standing(
        name=name, parameters={"beta": beta}, seed=seed, training=config, home=name, was_there=False, total=8
    )
    if right is not None:
        values = [float(digit) for digit in right]
        mean = sum(values) / len(values)
        found.trial = Trial(
            name=name,
            parameters={"beta": beta},
            seed=seed,
            accuracy=estimate(mean),
            deviations={"accuracy": tuple((value - mean) / len(values) for value in values)},
        )
    return found


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=16)


def paused(step: int, accuracy: float, kl: float | None) -> dict[str, Any]:
    """Its reward is 0.1 more than the KL."""
    found = None if kl is None else estimate(kl)
    reward = None if kl is None else estimate(kl + 0.1)
    point = Point(step=step, kl=found, length_ratio=found, reward=reward, deviations={"kl": (0.5, -0.5)})
    metrics = {"validation/rewards/accuracy": accuracy}
    return {"step": step, "metrics": metrics, "point": point_to_dict(point), "seconds": 1.5}


def test_a_step_stands_once_with_all_numbers_whoever_measured_it_last(config: RunConfig) -> None:
    """Two rungs at step 1 of a short training; the training itself measured step 4 as well, its accuracy alone."""
    one = standing(config, 0.1)
    for step, accuracy, kl in ((1, 0.5, 0.1), (1, 0.5, 0.1), (4, 0.75, 2.0)):
        one.pause(paused(step, accuracy, kl), SIZES)
    assert [point.step for point in one.points] == [1, 4]
    trial = Trial(
        name="beta=0.1,epochs=2", parameters={"beta": 0.1, "epochs": 2}, seed=7,
        points=(
            Point(step=4, accuracy=estimate(0.8)),
            Point(step=8, kl=estimate(3.0), deviations={"kl": (0.25, -0.25)}),
        ),
    )  # fmt: skip

    one.finish({"metrics": {}, "trial": trial_to_dict(trial), "seconds": 2.0})

    assert one.trial is not None
    assert one.seconds == 3 * 1.5 + 2.0
    assert (one.trial.name, one.trial.parameters, one.trial.seed) == ("beta=0.1,seed=0", {"beta": 0.1}, 0)
    names = ("accuracy", "kl", "length_ratio", "reward")
    known = [(p.step, *(e and e.value for e in (getattr(p, name) for name in names))) for p in one.trial.points]
    assert [point.deviations for point in one.trial.points] == [{"kl": (0.5, -0.5)}] * 2 + [{"kl": (0.25, -0.25)}]
    assert known == [(1, 0.5, 0.1, 0.1, 0.2), (4, 0.8, 2.0, 2.0, 2.1), (8, None, 3.0, None, None)]


def test_a_stopped_trial_has_the_numbers_of_its_last_rung_and_a_failed_one_none(config: RunConfig) -> None:
    """Both came to step 4."""
    stopped, failed = standing(config, 0.1), standing(config, 0.5)
    for one in (stopped, failed):
        one.pause(paused(4, 0.75, 2.0), SIZES)
    stopped.stop("at step 4")
    failed.fail("diverged")

    assert stopped.trial is not None
    assert failed.trial is not None
    assert (stopped.trial.steps, stopped.trial.kl, stopped.trial.length_ratio) == (4, estimate(2.0), estimate(2.0))
    assert stopped.trial.accuracy == stopped.points[-1].accuracy
    assert (stopped.trial.reward, stopped.trial.win_rate) == (estimate(2.1), None)
    assert (failed.trial.steps, failed.trial.kl, failed.trial.accuracy) == (4, None, None)
    assert stopped.is_lost
    assert failed.is_lost


def test_budgets_at_a_rung_look_at_the_mean_over_seeds(config: RunConfig) -> None:
    """KL 8 and 13: 10.5, over 10 by 0.5, within 11."""
    seeds = [standing(config, 0.1, seed) for seed in (0, 1)]
    for one, kl in zip(seeds, (8.0, 13.0), strict=True):
        one.pause(paused(4, 0.75, kl), SIZES)

    assert over_budget(seeds, SelectConfig(max_kl=10)) == "KL 10.500: over the budget of 10 by 0.500"
    assert over_budget(seeds, SelectConfig(max_kl=11)) == ""
    assert over_budget(seeds, ACCURACY) == ""


def test_no_setting_gives_way_to_one_of_which_seeds_are_still_to_come(config: RunConfig) -> None:
    """The first seed of beta 0.05 is better than the mean of beta 0.5, and its second may bring it down: until that has
    ended both are kept. Then 0.05 has 0.5 on average, and 0.5 wins: its policy must still be there."""
    done = [standing(config, 0.5, 0, "1111111000"), standing(config, 0.5, 1, "1111111000")]
    first, second = standing(config, 0.05, 0, "1111111111"), standing(config, 0.05, 1)

    assert to_keep([*done, first, second], ACCURACY) == {"beta=0.5,seed=0", "beta=0.05,seed=0"}
    ended = standing(config, 0.05, 1, "0000000000")
    assert to_keep([*done, first, ended], ACCURACY) == {"beta=0.5,seed=0"}


def test_failed_and_stopped_ones_are_not_kept(config: RunConfig) -> None:
    """Neither while other seeds run nor afterwards."""
    failed, running = standing(config, 0.1, 0), standing(config, 0.1, 1)
    failed.fail("diverged")

    assert to_keep([failed, running], ACCURACY) == set()
    running.fail("diverged")
    assert to_keep([failed, running], ACCURACY) == set()
