"""A small project with all that can be named: two trained policies, both registered, one of them the champion."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dpo_train import registry, storage
from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data.folder import MODEL_FOLDER, model_folder
from dpo_train.data.tokens import load_tokenizer
from dpo_train.model.export import export_policy
from dpo_train.preflight import use_storage
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.tracking import Tracking
from tests.command import write_config
from tests.tiny import tiny_config


@dataclass(frozen=True, kw_only=True)
class Project:
    """Version 1 is the adapters' policy and the champion; version 2 has all its weights trained, the challenger."""

    config: RunConfig
    file: Path
    adapters: Artifact
    whole: Artifact


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project, made once a session; nobody changes it. This process has its options on storage meanwhile."""
    pytest.importorskip("mlflow")
    made, before = _made(tmp_path_factory.getbasetemp() / "project"), storage.options()
    use_storage(made.config)
    yield made
    storage.use(before)


@functools.cache
def _made(folder: Path) -> Project:
    folder.mkdir()
    config = tiny_config(folder, storage__cache=str(folder / "cache"))
    local = InProcess()
    scored = score_reference(config, prepare(config, local), local)
    adapters = train(config, scored, local)
    all_weights = replace(config, train=replace(config.train, lora=None, max_steps=10))
    whole = train(all_weights, score_reference(all_weights, prepare(config, local), local), local)
    for policy in (adapters, whole):
        _register(config, policy)
    registry.promote(Tracking(config).client, config.register.model_name, "1")
    return Project(config=config, file=write_config(config, folder / "config.json"), adapters=adapters, whole=whole)


def _register(config: RunConfig, policy: Artifact) -> None:
    tracking = Tracking(config)
    tokenizer = load_tokenizer(model_folder(config.model.path))

    def write(root: Path) -> None:
        export_policy(config.model, policy.path, root, tokenizer)
        (root / MODEL_FOLDER / "README.md").write_text(f"# policy {policy.record.digest}\n")

    registry.register_version(
        tracking.client,
        tracking.uri,
        config.register.model_name,
        policy.record.digest,
        alias=config.register.alias,
        package=registry.Package(
            name="policy", write=write, tokenizer=tokenizer, chat=True, max_new_tokens=8, description="of a test"
        ),
        run_id=tracking.start_run("register"),
        tags={registry.POLICY_TAG: policy.record.digest, registry.PASSED_TAG: "true"},
    )
