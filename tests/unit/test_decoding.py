"""Strict decoding: what is asked of the dataclasses themselves; what people type is in test_config.py."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_train.config import (
    EndpointJudge,
    FunctionJudge,
    JudgeConfig,
    LoraConfig,
    RewardModelJudge,
    RunConfig,
    SourceConfig,
    parse_config,
)
from dpo_train.decoding import section_types, walk_options
from dpo_train.errors import ConfigError


def test_every_option_is_listed_with_its_help() -> None:
    """`dpo init` and the documentation are written from these; an option without help would be left unexplained."""
    options = dict(walk_options(RunConfig))
    assert {"train", "train.lora", "train.lora.rank", "evaluate.gate.min_margin"} <= set(options)
    assert list(options)[:2] == ["store", "seed"]
    assert [key for key, item in options.items() if not item.metadata.get("help")] == []


def test_section_types_finds_the_dataclasses_behind_a_field() -> None:
    """Through `| None` and a choice of kinds; none for plain values and lists."""
    hints: dict[Any, tuple[type, ...]] = {
        LoraConfig: (LoraConfig,),
        LoraConfig | None: (LoraConfig,),
        FunctionJudge | EndpointJudge | None: (FunctionJudge, EndpointJudge),
        int: (),
        str | None: (),
        tuple[SourceConfig, ...]: (),
    }
    assert {hint: section_types(hint) for hint in hints} == hints


def _with_judge(judge: str) -> JudgeConfig | None:
    return parse_config(f"model: {{path: /m}}\nprepare: {{path: /p}}\nevaluate: {{judge: {judge}}}").evaluate.judge


def test_kind_chooses_the_section() -> None:
    """Each kind has its own keys; none is needed."""
    assert _with_judge("{kind: function, function: a.b:c}") == FunctionJudge(kind="function", function="a.b:c")
    assert _with_judge("{kind: reward_model, path: /r}") == RewardModelJudge(kind="reward_model", path="/r")
    endpoint = _with_judge("{kind: endpoint, url: http://h/v1, model: m, max_cost: 2.5}")
    assert endpoint == EndpointJudge(kind="endpoint", url="http://h/v1", model="m", max_cost=2.5)
    assert _with_judge("null") is None


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        # The nearest key is one of the given kind, also where another kind has one that is nearer still.
        (
            "{kind: endpoint, url: u, model: m, modle: m}",
            "unknown key 'evaluate.judge.modle' (did you mean 'evaluate.judge.model'?)",
        ),
        ("{kind: function, function: a:b, urll: u}", "unknown key 'evaluate.judge.urll'."),
        ("{kind: function, function: a:b, url: u}", "unknown key 'evaluate.judge.url'."),
        ("{kind: endpoint, url: u, model: m, endpoint: 3}", "unknown key 'evaluate.judge.endpoint'"),
        ("{kind: function}", "1 mistake: 'evaluate.judge.function' is required"),
        (
            "{kind: reward_model, path: /r, max_tokens: 0}",
            "'evaluate.judge.max_tokens' should be greater than or equal to 1, got 0",
        ),
        (
            "{kind: endpiont, url: u}",
            "1 mistake: 'evaluate.judge.kind' should be 'function', 'reward_model' or 'endpoint', got 'endpiont'.",
        ),
        ("{url: u}", "1 mistake: 'evaluate.judge.kind' is required: 'function', 'reward_model' or 'endpoint'."),
        ("endpoint", "'evaluate.judge' should be an object, got 'endpoint'"),
    ],
)
def test_mistake_in_a_section_of_kinds_names_its_key(judge: str, message: str) -> None:
    """The kind's name, which pydantic puts into the place of a mistake, is no key of ours."""
    with pytest.raises(ConfigError) as caught:
        _with_judge(judge)
    assert message in str(caught.value)
