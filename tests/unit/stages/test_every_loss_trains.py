"""Every loss trains a policy that prefers the chosen answers, through the stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.objective import RULES
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow
LOCAL = InProcess()

# discopop rises around h = 0, where every policy starts (docs/losses.md).
CHANGES: dict[str, dict[str, Any]] = {name: {"loss": name} for name in RULES if name != "discopop"}
CHANGES["exo_pair"] |= {"label_smoothing": 1e-3}
CHANGES["robust"] |= {"label_smoothing": 0.1}
CHANGES["simpo"] |= {"beta": 2.0}
CHANGES |= {
    "mixture": {"loss": {"sigmoid": 1.0, "sft": 0.1}},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "alpha": {"divergence": "alpha", "divergence_alpha": 0.3},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"wpo": True},
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Artifact]:
    config = tiny_config(tmp_path_factory.mktemp("losses"))
    return config, score_reference(config, prepare(config, LOCAL), LOCAL)


@pytest.mark.parametrize("name", CHANGES)
def test_loss_falls_and_validation_pairs_are_told_apart(scored: tuple[RunConfig, Artifact], name: str) -> None:
    """Twenty steps on pairs that can be learned: accuracy above 0.9 on pairs that were not trained on."""
    config, artifact = scored
    metrics = train(replace(config, train=replace(config.train, **CHANGES[name])), artifact, LOCAL).record.metrics
    assert metrics["loss"] < metrics["first_loss"]
    assert metrics["validation/rewards/accuracy"] > 0.9
    assert metrics["validation/rewards/margin"] > 0


def test_discopop_may_settle_on_the_wrong_side(scored: tuple[RunConfig, Artifact]) -> None:
    """Its slope at h = 0 is (1 - ln 2) / (4 tau) - 3/4 = +0.78: here the loss falls and accuracy with it."""
    config, artifact = scored
    made = train(replace(config, train=replace(config.train, loss="discopop")), artifact, LOCAL)
    assert made.record.metrics["loss"] < made.record.metrics["first_loss"]
    assert made.record.metrics["validation/rewards/accuracy"] < 0.5
