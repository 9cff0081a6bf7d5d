"""A sweep in which every kind of trial stands: chosen, as good, worse, over the budget, stopped, failed, two seeds."""

from __future__ import annotations

from typing import Any

from dpo_train.config import SelectConfig
from dpo_train.evaluate.trials import Point, Trial
from dpo_train.findings import Estimate

CONFIG = SelectConfig(max_kl=12)


def estimate(value: float, half: float = 0.05, n: int = 100) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def trial(beta: float, right: int, kl: float | None, *, seed: int = 0, of: int = 100, **fields: Any) -> Trial:
    """``right`` of 100 pairs, the first ones; points on the way where none are given."""
    accuracy = right / of
    values = [1.0] * right + [0.0] * (of - right)
    steps = (20, 40, 80)
    points = tuple(
        Point(
            step=step,
            accuracy=estimate(0.5 + (accuracy - 0.5) * share, 0.06),
            kl=None if kl is None else estimate(kl * share, 0.3, 16),
        )
        for step, share in zip(steps, (0.4, 0.75, 1.0), strict=True)
    )
    parameters = {"beta": beta, **fields.pop("parameters", {})}
    name = ",".join(f"{key}={value}" for key, value in parameters.items())
    return Trial(
        **{
            "name": f"{name},seed={seed}" if seed else name,
            "parameters": parameters,
            "seed": seed,
            "steps": 80,
            "accuracy": estimate(accuracy),
            "margin": estimate(beta * 3),
            "kl": None if kl is None else estimate(kl, 0.2 * kl + 0.1, 16),
            "length_ratio": estimate(1 + 0.02 * (kl or 0), 0.1, 16),
            "deviations": {"accuracy": tuple((value - accuracy) / of for value in values)},
            "points": points,
            **fields,
        }
    )


def sweep() -> list[Trial]:
    """By beta from small to large."""
    return [
        Trial(name="beta=0.005", parameters={"beta": 0.005}, seed=0, failure="NonFiniteLossError: step 3, rank 0"),
        trial(0.01, 84, 21.0),
        trial(0.02, 83, 11.5),
        trial(0.05, 82, 6.2),
        trial(0.05, 84, 7.4, seed=1),
        trial(0.1, 82, 3.4),
        trial(0.1, 80, 2.9, seed=1),
        trial(0.2, 74, 1.5, stopped="at step 40: 5th of 8 by rewards/accuracy", steps=40),
        trial(0.5, 66, 0.3),
        trial(1.0, 60, 0.05),
    ]
