"""Which model a name means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train import named_models
from dpo_train.artifacts import Artifact
from dpo_train.config import ModelConfig, RunConfig
from dpo_train.errors import ConfigError, StoreError, UserError
from dpo_train.stages import prepare, score_reference, sft, train
from dpo_train.stages.executor import InProcess
from dpo_train.stages.sft import with_model_of
from tests.projects import Project, project
from tests.tiny import tiny_config, tiny_model

__all__ = ["project"]


def test_aliases_and_numbers_mean_registered_versions(project: Project) -> None:
    """Version 1 is the champion, 2 the challenger; each is known by the policy that it was made from."""
    champion, first, challenger = (named_models.find(project.config, name) for name in ("champion", "1", "challenger"))

    assert champion.about == first.about == "dpo-policy version 1"
    assert champion.model == first.model
    assert champion.digest == project.adapters.record.digest
    assert (challenger.about, challenger.digest) == ("dpo-policy version 2", project.whole.record.digest)
    assert champion.weights is None
    assert (Path(champion.model.path) / "model.safetensors").is_file()


def test_unknown_version_is_told_with_those_there_are(project: Project) -> None:
    """The message names versions and aliases."""
    with pytest.raises(
        UserError, match=r"has no version '7'.*versions: 1, 2; aliases: challenger \(2\), champion \(1\)"
    ):
        named_models.find(project.config, "7")


def test_policy_is_the_one_named_else_the_newest(project: Project) -> None:
    """The second training ended last."""
    named = named_models.find(project.config, "policy", project.adapters)
    assert (named.digest, named.weights) == (project.adapters.record.digest, project.adapters.path)
    assert named_models.find(project.config, "policy").digest == project.whole.record.digest


def test_reference_is_the_untrained_model(project: Project) -> None:
    """Of a project without SFT that is the config's."""
    named = named_models.find(project.config, "reference")
    assert (named.model, named.weights) == (project.config.model, None)


def test_nothing_trained_is_said(tmp_path: Path) -> None:
    """There is no policy yet; the reference is there all the same, unless SFT is to make it."""
    config = tiny_config(tmp_path)
    with pytest.raises(StoreError, match="Nothing was trained yet"):
        named_models.find(config, "policy")
    assert named_models.find(config, "reference").model == config.model
    with pytest.raises(UserError, match=r"sft\.enabled, and nothing was trained"):
        named_models.find(replace(config, sft=replace(config.sft, enabled=True)), "reference")


def test_policy_of_another_model_is_refused(project: Project, tmp_path: Path) -> None:
    """Its adapters would be merged into weights that they do not belong to."""
    other = replace(project.config, model=ModelConfig(path=str(tiny_model(tmp_path / "model", seed=7))))
    with pytest.raises(ConfigError, match="was trained from another model than"):
        named_models.of_training(other, project.adapters)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Artifact, Artifact]:
    """A project with SFT: its config, the SFT's output, and the policy."""
    config = tiny_config(
        tmp_path_factory.mktemp("tuned"), sft__enabled=True, sft__max_steps=2, sft__row_tokens=256, train__max_steps=2
    )
    local = InProcess()
    pairs = prepare(config, local)
    first = sft(config, pairs, local)
    on = with_model_of(first.home, config)
    return config, first, train(on, score_reference(on, pairs, local), local)


def test_policy_after_sft_starts_from_its_model(tuned: tuple[RunConfig, Artifact, Artifact]) -> None:
    """Reference and base of the adapters are what SFT made, found by the digest that the policy names."""
    config, first, policy = tuned
    assert named_models.of_training(config, policy).model.path == f"{first.home}/model"
    assert named_models.find(config, "reference").model.path == f"{first.home}/model"
