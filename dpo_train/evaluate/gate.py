"""The gate: estimates and rules to a verdict. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_train.artifacts import Estimate, Verdict
from dpo_train.config import GateConfig


def judge(accuracy: Estimate, margin: Estimate, config: GateConfig) -> Verdict:
    """Applies every rule. ``learned`` is the bar below which the training itself has failed: chance.

    A rule compares strictly: a bound at the limit does not pass, and neither does NaN.
    """
    rules = (
        _rule("accuracy lower bound", accuracy.low, config.min_accuracy),
        _rule("mean margin", margin.value, config.min_margin),
    )
    learned = accuracy.low > 0.5 and margin.value > 0
    return Verdict(learned=learned, passed=learned and all(rule["passed"] for rule in rules), rules=rules)


def _rule(name: str, found: float, limit: float) -> Mapping[str, Any]:
    return {"rule": name, "found": found, "must_exceed": limit, "passed": bool(found > limit)}
