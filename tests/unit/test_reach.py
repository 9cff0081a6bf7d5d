"""What jobs on a cluster would not see is said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ConfigError
from dpo_train.preflight import check_inputs, check_reach

REMOTE = {
    "store": "s3://bucket/store",
    "model": {"path": "org/model"},
    "prepare": {"path": "hf://org/pairs"},
    "cluster": {"launcher": "rayjob", "volumes": {"/data": "claim"}},
}


def config_of(**changes: Any) -> RunConfig:
    return parse_config(json.dumps(REMOTE), [f"{key.replace('__', '.')}={json.dumps(v)}" for key, v in changes.items()])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="addresses and hub names"),
        pytest.param({"store": "/data/store", "prepare__path": "/data/in/*.jsonl"}, id="below a mounted volume"),
        pytest.param({"store": "/data"}, id="the volume itself"),
        pytest.param({"evaluate__judge": {"kind": "endpoint", "url": "http://j/v1", "model": "m"}}, id="judge's words"),
    ],
)
def test_what_pods_see_passes(changes: dict[str, Any]) -> None:
    """Whether it is there, other checks say."""
    check_reach(config_of(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("store", "/home/me/store"),
        ("model.path", "/home/me/model"),
        ("model.adapter", "/home/me/adapter"),
        ("prepare.path", "/home/me/pairs.jsonl"),
        ("prepare.chat_template", "/home/me/template.jinja"),
        ("prepare.evaluation_prompts", "/home/me/prompts.txt"),
        ("tracking.uri", "sqlite:////home/me/mlflow.db"),
        ("store", "/database/store"),
    ],
)
def test_what_lies_on_this_machine_is_refused_by_its_key(key: str, value: str) -> None:
    """Also where the name of a mount only begins like it."""
    with pytest.raises(ConfigError, match=f"{key}=/.*cluster.volumes") as caught:
        check_reach(config_of(**{key: value}))

    assert "(/data)" in str(caught.value)


@pytest.mark.parametrize(
    ("judge", "key"),
    [
        ({"kind": "reward_model", "path": "/home/me/judge"}, "evaluate.judge.path"),
        ({"kind": "endpoint", "url": "http://j/v1", "model": "m", "prompt": "/me/p.txt"}, "evaluate.judge.prompt"),
    ],
)
def test_files_of_judges_are_looked_at(judge: dict[str, str], key: str) -> None:
    """They are read where the evaluation runs."""
    with pytest.raises(ConfigError, match=key):
        check_reach(config_of(evaluate__judge=judge))


def test_all_of_several_sources_are_named_at_once() -> None:
    """One message, not one for each attempt."""
    tree = {**REMOTE, "prepare": {"sources": [{"path": "/a.jsonl"}, {"path": "/data/b.jsonl"}, {"path": "/c.jsonl"}]}}

    with pytest.raises(ConfigError) as caught:
        check_reach(parse_config(json.dumps(tree)))

    assert "prepare.sources[0].path=/a.jsonl; prepare.sources[2].path=/c.jsonl" in str(caught.value)


def test_without_jobs_any_path_will_do(tmp_path: Path) -> None:
    """Stages run where the command runs."""
    check_reach(config_of(cluster__launcher="none", store=str(tmp_path)))


def test_it_comes_before_all_that_takes_time(tmp_path: Path) -> None:
    """Nothing is looked for on a hub, and the store is not touched."""
    with pytest.raises(ConfigError, match="would not see"):
        check_inputs(config_of(store=str(tmp_path / "store")))

    assert not (tmp_path / "store").exists()
