"""Judges that look at one answer at a time and reward it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dpo_train.config import FunctionJudge, RewardModelJudge
from dpo_train.data.folder import model_folder
from dpo_train.errors import RunError, first_line
from dpo_train.evaluate.judge.checks import PATH
from dpo_train.evaluate.judge.functions import find
from dpo_train.evaluate.judge.judgement import LOSS, TIE, WIN, Judgement

REWARDS_SCHEMA = pa.schema([("id", pa.string()), ("reward", pa.float64())])
"""Null: nothing usable."""

_SHOWN_CHARS = 80


def rewarder(config: FunctionJudge | RewardModelJudge, device: str) -> Callable[[pa.Table], pa.Table]:
    """A function from rows (id string, prompt list<struct<role, content>>, answer string) to REWARDS_SCHEMA.

    Raises:
        ConfigError: there is no such function.
        ModelError: the model cannot be had, or is none that rewards.
    """
    if isinstance(config, FunctionJudge):
        function, name = find(config.function), config.function

        def each(rows: Sequence[Mapping[str, Any]]) -> list[float]:
            return [_call(function, name, row) for row in rows]

        return _over_tables(each)

    from dpo_train.model.load import select_device
    from dpo_train.model.reward_model import RewardModel

    model = RewardModel(model_folder(config.path, PATH), device=select_device(device), max_tokens=config.max_tokens)
    return _over_tables(lambda rows: model([(row["prompt"], row["answer"]) for row in rows]))


def compare_rewards(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[Judgement]:
    """The larger reward wins; equal ones tie; without one of the two there is no outcome."""
    return [_compare(mine, other) for mine, other in zip(ours, theirs, strict=True)]


def best_of(rewards: Sequence[float | None]) -> int:
    """Index of the largest reward, the first of several; 0 where there is none at all."""
    values = [-math.inf if reward is None or math.isnan(reward) else reward for reward in rewards]
    return values.index(max(values))


def _compare(ours: float | None, theirs: float | None) -> Judgement:
    if ours is None or theirs is None or math.isnan(ours) or math.isnan(theirs):
        return Judgement(outcome=None, reason="an answer got no reward")
    return Judgement(outcome=TIE if ours == theirs else WIN if ours > theirs else LOSS)


def _over_tables(each: Callable[[Sequence[Mapping[str, Any]]], list[float]]) -> Callable[[pa.Table], pa.Table]:
    def reward(table: pa.Table) -> pa.Table:
        rewards = [None if math.isnan(value) else value for value in each(table.to_pylist())]
        return pa.table({"id": table["id"], "reward": pa.array(rewards, pa.float64())}, schema=REWARDS_SCHEMA)

    return reward


def _call(function: Callable[..., Any], name: str, row: Mapping[str, Any]) -> float:
    messages = [dict(message) for message in row["prompt"]]
    shown = f"the prompt {messages[-1]['content'][:_SHOWN_CHARS]!r}" if messages else "an empty prompt"
    try:
        reward = function(messages, row["answer"])
    except Exception as error:
        raise RunError(
            f"The judge's function {name} raised {type(error).__name__} at {shown}: {first_line(error)}",
            fix="mend it; it may return float('nan') where it can say nothing",
        ) from error
    try:
        # NumPy's and torch's numbers have __float__ too; a text that reads as a number is a mistake all the same.
        if isinstance(reward, str | bytes | bool):
            raise TypeError
        return float(reward)
    except OverflowError:
        raise RunError(
            f"The judge's function {name} returned a number at {shown} that is too large for a float",
            expected=f"at most {sys.float_info.max:.3g}, or float('inf')",
        ) from None
    except (TypeError, ValueError, RuntimeError):
        raise RunError(
            f"The judge's function {name} returned no number at {shown}",
            got=repr(reward)[:_SHOWN_CHARS],
            expected="a float, NaN where it can say nothing",
        ) from None
