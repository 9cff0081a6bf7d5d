"""The flow with a champion: what a run compares with, and what a second run of it finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from dpo_train import registry
from dpo_train.config import RunConfig
from dpo_train.errors import GateRefusedError, UserError
from dpo_train.launch import Result, run
from dpo_train.tracking import Tracking
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("flow"), register__model_name="tiny")


@pytest.fixture(scope="module")
def first(config: RunConfig) -> Result:
    """Run and promoted: version 1 is the champion."""
    result = run(config)
    assert result.artifacts["evaluate"].record.details["champion"] is None
    assert registry.promote(Tracking(config).client, "tiny", "challenger").version == "1"
    return result


def other_beta(config: RunConfig, **rules: float) -> RunConfig:
    gate = replace(config.evaluate.gate, **rules)
    return replace(
        config, train=replace(config.train, beta=0.3), evaluate=replace(config.evaluate, gate=gate, num_prompts=2)
    )


def test_next_policy_is_compared_with_the_champion(config: RunConfig, first: Result) -> None:
    """Its report names version 1 and pairs both on every held-out pair; it becomes version 2."""
    result = run(other_beta(config))

    findings = json.loads(result.artifacts["evaluate"].file("report.json").read_text())["findings"]
    assert findings["champion"]["version"] == "1"
    assert findings["champion"]["digest"] == first.artifacts["train"].record.digest
    paired = findings["heldout"]["champion"]["difference"]
    assert paired["n"] == result.artifacts["evaluate"].record.counts["heldout_pairs"]
    assert {each["model"] for each in findings["samples"]} == {"policy", "reference", "champion"}
    assert result.model_uri == "models:/tiny/2"


def test_run_again_after_its_promotion_finds_its_own_report_and_version(config: RunConfig, first: Result) -> None:
    """Version 2 as champion is compared with the champion before it, as at first: nothing runs, nothing is added."""
    result = run(other_beta(config))
    client = Tracking(config).client
    assert registry.promote(client, "tiny", "2").previous == "1"

    again = run(other_beta(config))

    assert all(artifact.reused for artifact in again.artifacts.values())
    assert again.model_uri == result.model_uri
    assert registry.rollback(client, "tiny").version == "1"


def test_refused_policy_is_a_finished_run_without_a_version(config: RunConfig, first: Result) -> None:
    """A rule that it cannot meet: the message names it, and the champion stays."""
    client = Tracking(config).client
    before = len(client.search_model_versions("name = 'tiny'"))

    with pytest.raises(GateRefusedError, match="margin"):
        run(other_beta(config, min_margin=1e6))

    assert len(client.search_model_versions("name = 'tiny'")) == before
    assert registry.champion(client, "tiny", "champion").version == "1"


def test_champion_that_does_not_exist_is_refused_by_name(config: RunConfig, first: Result) -> None:
    """What there is stands in the message."""
    with pytest.raises(UserError, match=r"tiny has no version '7'\. Got: versions: 1"):
        run(replace(config, evaluate=replace(config.evaluate, champion="7")))


def test_store_of_the_report_is_where_the_run_left_it(first: Result) -> None:
    """The report is for people too."""
    assert Path(first.report).read_text().startswith("<!doctype html>")
