"""Scored pairs, and a store of its own for every test of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.stages import prepare, score_reference
from tests.tiny import tiny_config
from tests.unit.stages.sweep.project import (
    LOCAL,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Artifact]:
    """Eight steps are a whole training here."""
    config = tiny_config(tmp_path_factory.mktemp("sweep"), train__max_steps=8)
    config = replace(config, sweep=replace(config.sweep, num_prompts=2))
    return config, score_reference(config, prepare(config, LOCAL), LOCAL)


@pytest.fixture
def config(made: tuple[RunConfig, Artifact], tmp_path: Path) -> RunConfig:
    """With a store of its own for what is trained."""
    return replace(made[0], store=str(tmp_path / "store"))


@pytest.fixture
def scored(made: tuple[RunConfig, Artifact]) -> Artifact:
    return made[1]
