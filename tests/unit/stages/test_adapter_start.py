"""A model that has an adapter already, and modules that are not trained, through the stages."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, load_config
from dpo_train.data.shards import Split
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import ConfigError, ModelError
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.model.load import load_policy, merged_model
from dpo_train.model.score_table import ScoreTable
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.common import model_digest
from dpo_train.stages.evaluate_models import Asked, _build, prompt_tables
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config

LOCAL = InProcess()
CPU = torch.device("cpu")


def with_(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("stages"), train__max_steps=8)


@pytest.fixture(scope="module")
def pairs(plain: RunConfig) -> Artifact:
    return prepare(plain, LOCAL)


@pytest.fixture(scope="module")
def first(plain: RunConfig, pairs: Artifact) -> Artifact:
    """A training that leaves an adapter."""
    return train(plain, score_reference(plain, pairs, LOCAL), LOCAL)


@pytest.fixture(scope="module")
def config(plain: RunConfig, first: Artifact) -> RunConfig:
    """The next training goes on from it."""
    return with_(plain, "model", adapter=str(first.path / "adapter"))


@pytest.fixture(scope="module")
def scored(config: RunConfig, pairs: Artifact) -> Artifact:
    return score_reference(config, pairs, LOCAL)


@pytest.fixture(scope="module")
def second(config: RunConfig, scored: Artifact) -> Artifact:
    return train(config, scored, LOCAL)


def reference_logps(scored: Artifact) -> np.ndarray:
    columns = (Split(scored, "heldout").table()[f"reference_{side}_logps"] for side in ("chosen", "rejected"))
    return np.concatenate([np.concatenate(column.to_pylist()) for column in columns])


def first_line(artifact: Artifact) -> dict[str, float]:
    found: dict[str, float] = json.loads((artifact.path / "metrics.jsonl").read_text().splitlines()[0])
    return found


def test_reference_is_the_base_with_its_adapter(
    plain: RunConfig, config: RunConfig, first: Artifact, scored: Artifact, pairs: Artifact
) -> None:
    """What the first training left scores its pairs as the second's reference does, and not as the base."""
    table = Split(pairs, "heldout").table()
    by_policy = ScoreTable(load_policy(plain.model, device=CPU, weights=first.path), 256)(table)
    order = {pair: place for place, pair in enumerate(Split(scored, "heldout").table()["pair_id"].to_pylist())}
    assert by_policy["pair_id"].to_pylist() == list(order)
    columns = (by_policy[f"{side}_logps"].to_pylist() for side in ("chosen", "rejected"))
    wanted = np.concatenate([np.concatenate(column) for column in columns])
    np.testing.assert_allclose(reference_logps(scored), wanted, rtol=1e-5, atol=1e-5)
    of_base = reference_logps(score_reference(plain, pairs, LOCAL))
    assert np.abs(of_base - wanted).mean() > 0.1


def test_training_begins_where_its_reference_is(second: Artifact, first: Artifact) -> None:
    """First loss ln 2 with no drift on either side, though the adapter has moved far from the base; then it learns."""
    line = first_line(second)
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(line["drift/chosen"]) < 1e-4
    assert abs(line["drift/rejected"]) < 1e-4
    assert second.record.metrics["loss"] < 0.6
    config = json.loads((second.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    weights = [load_file(made.path / "adapter" / "adapter_model.safetensors") for made in (first, second)]
    assert weights[0].keys() == weights[1].keys()


def test_samples_of_the_reference_are_those_of_the_base_with_its_adapter(
    plain: RunConfig, config: RunConfig, pairs: Artifact, second: Artifact
) -> None:
    """Not those of the base alone, which the policy's adapters switched off would give."""
    heldout = Split(pairs, "heldout").table().slice(0, 4)
    (prompts,) = prompt_tables(heldout["pair_id"], heldout["prompt_ids"], (1.0,), size=4)
    asked = {
        "reference": Asked(name="reference", model=config.model, frozen_base=True),
        "policy": Asked(name="policy", model=config.model, weights=second, frozen_base=True),
    }
    answers = {name: _build(config, each, None)(prompts)["answer"].to_pylist() for name, each in asked.items()}

    tokenizer = load_tokenizer(Path(plain.model.path))
    policies = {
        "reference": load_policy(config.model, device=CPU),
        "policy": load_policy(plain.model, device=CPU, weights=second.path),
        "base": load_policy(plain.model, device=CPU),
    }
    options = {"max_tokens": config.evaluate.max_sample_tokens, "seed": config.seed, "batch": 4}
    wanted = {
        name: AnswerPrompts(policy, tokenizer, **options)(prompts)["answer"].to_pylist()
        for name, policy in policies.items()
    }

    assert answers == {name: wanted[name] for name in answers}
    assert wanted["base"] != wanted["reference"] != wanted["policy"]


def test_evaluation_measures_against_where_the_training_began(
    config: RunConfig, scored: Artifact, second: Artifact
) -> None:
    """Margins are log-ratios to the base with its adapter, and the report is complete."""
    made = evaluate(config, scored, second, LOCAL)
    assert made.record.details["learned"] is True
    assert made.record.inputs["model"] == scored.record.inputs["model"] == model_digest(config)


def test_merged_model_is_the_base_with_the_last_adapter(config: RunConfig, plain: RunConfig, second: Artifact) -> None:
    """What is registered computes what was evaluated; the first adapter is not in it twice."""
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = merged_model(config.model, second.path)(ids).logits
        wanted = load_policy(plain.model, device=CPU, weights=second.path).model(ids).logits
    assert (merged - wanted).norm() <= 1e-5 * wanted.norm()


def test_full_training_begins_with_the_adapter_merged(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """Its reference is the same merged model: no drift at the first step; then all weights are trained and judged."""
    full = with_(replace(config, store=str(tmp_path)), "train", lora=None, learning_rate=1e-3)
    scored = score_reference(full, pairs, LOCAL)
    made = train(full, scored, LOCAL)
    assert (made.path / "model" / "model.safetensors").is_file()
    assert abs(first_line(made)["drift/chosen"]) < 1e-4
    assert evaluate(full, scored, made, LOCAL).record.details["learned"] is True


def test_another_adapter_is_another_model(
    plain: RunConfig, config: RunConfig, pairs: Artifact, scored: Artifact, second: Artifact, tmp_path: Path
) -> None:
    """By content: a copy elsewhere is the same, another adapter, none, and 4-bit weights are others."""
    copy = shutil.copytree(Path(str(config.model.adapter)), tmp_path / "copy")
    (copy / "README.md").write_text("of a trainer")
    assert model_digest(with_(config, "model", adapter=str(copy))) == model_digest(config)
    assert score_reference(with_(config, "model", adapter=str(copy)), pairs, LOCAL).path == scored.path
    others = (
        plain,
        config,
        with_(config, "model", adapter=str(second.path / "adapter")),
        with_(plain, "model", quantization="nf4"),
        with_(config, "model", quantization="nf4"),
    )
    assert len({model_digest(other) for other in others}) == len(others)


def test_pairs_scored_without_the_adapter_are_refused(config: RunConfig, plain: RunConfig, pairs: Artifact) -> None:
    """Before anything is loaded, naming what differs."""
    with pytest.raises(ConfigError, match=rf"another model than .*, model\.adapter={config.model.adapter}"):
        train(config, score_reference(plain, pairs, LOCAL), LOCAL)


@pytest.mark.parametrize(("key", "value"), [("rank", 8), ("alpha", 4.0)])
def test_shape_that_contradicts_the_adapter_is_told_before_scoring(
    config: RunConfig, pairs: Artifact, tmp_path: Path, key: str, value: float
) -> None:
    """Nothing is scored for a training that will be refused."""
    wrong = with_(replace(config, store=str(tmp_path)), "train", lora=replace(config.train.lora, **{key: value}))  # type: ignore[type-var, arg-type]
    with pytest.raises(ConfigError, match=rf"another {key}.*lora\.{key}={value:g}"):
        score_reference(wrong, pairs, LOCAL)
    assert list(tmp_path.iterdir()) == []


def test_absent_adapter_is_told_before_scoring(plain: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """By its path."""
    with pytest.raises(ModelError, match=r"There is no adapter folder .*nowhere"):
        score_reference(with_(plain, "model", adapter=str(tmp_path / "nowhere")), pairs, LOCAL)


def test_relative_adapter_is_taken_from_the_current_folder(
    plain: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run elsewhere. An address at s3:// stays as it is."""
    monkeypatch.chdir(tmp_path)
    tree = f"model: {{path: {plain.model.path}, adapter: one}}\nprepare: {{path: {plain.prepare.path}}}\n"
    (tmp_path / "config.yaml").write_text(tree)
    assert load_config("config.yaml").model.adapter == os.path.join(tmp_path, "one")  # noqa: PTH118
    assert load_config("config.yaml", ["model.adapter=s3://b/one"]).model.adapter == "s3://b/one"
    with pytest.raises(ConfigError, match=r"model\.adapter has an address that is not s3://"):
        load_config("config.yaml", ["model.adapter=gs://b/one"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.frozen=[norm]", "train.lora={}"], r"train\.frozen names modules of a full training"),
        (["model.quantization=nf4"], r"without train\.lora its weights would be trained"),
        (["model.quantization=nf4", "train.lora={}", "compute.shard='on'"], r"compute\.shard=on.* do not go with it"),
        (["model.quantization=nf4", "train.lora={}", "compute.tensor_parallel=2"], r"compute\.tensor_parallel do not"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    plain: RunConfig, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """Before anything runs."""
    (tmp_path / "c.yaml").write_text(f"model: {{path: {plain.model.path}}}\nprepare: {{path: {plain.prepare.path}}}\n")
    assert load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", overrides)


def test_frozen_modules_leave_a_training_as_they_were(plain: RunConfig, pairs: Artifact) -> None:
    """Bit for bit in the output; every other weight has moved, and the policy has learned."""
    frozen = with_(plain, "train", lora=None, learning_rate=1e-3, frozen=("embed_tokens", "layers.0"))
    scored = score_reference(frozen, pairs, LOCAL)
    made = train(frozen, scored, LOCAL)
    before = load_file(Path(plain.model.path) / "model.safetensors")
    after = load_file(made.path / "model" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or ".layers.0." in name}
    assert made.record.metrics["loss"] < made.record.metrics["first_loss"]
    assert train(with_(frozen, "train", frozen=()), scored, LOCAL).path != made.path


def test_frozen_name_that_means_nothing_stops_the_training(plain: RunConfig, pairs: Artifact) -> None:
    """By its name."""
    wrong = with_(plain, "train", lora=None, frozen=("embed_tokens", "wte"))
    with pytest.raises(ModelError, match=r"no such module\. Got: frozen: wte"):
        train(wrong, score_reference(wrong, pairs, LOCAL), LOCAL)
