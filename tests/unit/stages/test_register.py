"""What a registration asks before it turns to the registry; the rest needs a server and stands with those tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from dpo_train.artifacts import Artifact, Output, Summary, produce
from dpo_train.config import RunConfig
from dpo_train.errors import ConfigError
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess
from dpo_train.stages.register import _name, answer_ends, register
from dpo_train.tracking import Tracking
from tests.mlflow.made import made_policy, made_report
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_model

PAD_ID = 0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Its own chat template ends turns with another token than the tokenizer's."""
    folder = tmp_path_factory.mktemp("register")
    (folder / "own.jinja").write_text(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|pad|>"))
    return tiny_config(folder, prepare__chat_template=str(folder / "own.jinja"))


@pytest.fixture(scope="module")
def policy(config: RunConfig) -> Artifact:
    """With its pairs in the store."""
    local = InProcess()
    return made_policy(config, scored=score_reference(config, prepare(config, local), local).record.digest)


def test_policy_of_another_model_is_refused(config: RunConfig, policy: Artifact, tmp_path: Path) -> None:
    """One of the same shape would load, and the adapter on it would be something that nobody has measured."""
    other = replace(config, model=replace(config.model, path=str(tiny_model(tmp_path, seed=1))))
    with pytest.raises(ConfigError, match=f"{policy.home} was trained from another model than {tmp_path}"):
        register(other, policy, made_report(config, policy), Tracking(config))


@pytest.mark.parametrize("option", ["chat_template", "template"])
def test_policy_of_another_template_is_refused(config: RunConfig, policy: Artifact, option: str) -> None:
    """It would be served with words that it was not trained on."""
    changes = {"chat_template": {"chat_template": None}, "template": {"template": "plain"}}[option]
    other = replace(config, prepare=replace(config.prepare, **changes))
    with pytest.raises(ConfigError, match=rf"trained on pairs with another prepare\.{option} than this"):
        register(other, policy, made_report(config, policy), Tracking(config))


def test_answers_end_where_those_of_the_pairs_do(config: RunConfig, policy: Artifact, tmp_path: Path) -> None:
    """By the pairs in the store; where they are not in it that is told, for generation may then not end."""
    said: list[str] = []
    assert answer_ends(config, policy, said.append) == (PAD_ID,)
    assert not said
    assert answer_ends(replace(config, store=str(tmp_path)), policy, said.append) == ()
    assert said == [f"the pairs of {policy.home} are not in {tmp_path}: answers end at the tokenizer's end token alone"]


def test_base_model_is_named_as_people_know_it(tmp_path: Path) -> None:
    """A hub name as it is, a folder by its last part, a champion that was started from as the registry names it."""

    def body(out: Output) -> Summary:
        (out.path / "model").mkdir()
        return Summary(details={"model_name": "dpo-policy", "version": "3"})

    champion = produce("champion", {}, {}, tmp_path / "champion" / "0123", body)
    (tmp_path / "my-model").mkdir()

    assert _name("org/model") == "org/model"
    assert _name(str(tmp_path / "my-model")) == "my-model"
    assert _name(f"{champion.home}/model") == "dpo-policy version 3"
