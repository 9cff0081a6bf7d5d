"""Bases in 4 bits under adapters, with bitsandbytes itself; where it is not installed, that this is said."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_train.artifacts import Artifact
from dpo_train.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, MissingPackageError, ModelError
from dpo_train.model.load import Policy, load_policy, merged_model, save_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import check_layout, row_logps
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.tiny import random_pairs, tiny_config, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

HAS_IT = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not HAS_IT, reason="bitsandbytes is not installed")
CPU = torch.device("cpu")
PAIRS = random_pairs(4, vocabulary=VOCABULARY)
LORA = LoraConfig(rank=2)


def load(folder: Path, *, quantized: bool = True, **options: Any) -> Policy:
    config = ModelConfig(path=str(folder), quantization="nf4" if quantized else None)
    return load_policy(config, device=CPU, **options)


@torch.no_grad()
def logps(policy: Policy) -> Tensor:
    return row_logps(policy, build_row(PAIRS)).token_logps_A


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(3, 40)[None]).logits
    return found


def move(policy: Policy) -> Policy:
    """A made-up training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base"), FAMILIES["llama"])


@pytest.mark.skipif(HAS_IT, reason="bitsandbytes is installed")
def test_missing_package_is_named_with_its_extra(base: Path) -> None:
    """The user's mistake, exit code 2."""
    with pytest.raises(MissingPackageError, match=r"needs bitsandbytes.*pip install 'dpo-train\[qlora\]'") as caught:
        load(base)
    assert caught.value.exit_code == 2


@needs_it
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_a_quantised_base(tmp_path: Path, family: str) -> None:
    """Linear weights are 4 bits each, the vocabulary matrix, which log-probs take directly, is what it was; packed
    rows are right, and every second factor gets a gradient, also after a forward that wanted none."""
    folder = write(tmp_path, FAMILIES[family])
    policy, plain = load(folder, lora=LORA, trainable=True), load(folder, quantized=False)
    check_layout(policy)
    head, wanted = (p.model.get_output_embeddings().weight for p in (policy, plain))
    assert head.dtype == torch.float32
    assert torch.equal(head, wanted)
    assert not torch.allclose(logps(policy), logps(plain), atol=1e-2)
    quantised = [p for p in policy.model.parameters() if p.dtype == torch.uint8]
    assert len(quantised) >= 2 * 4

    row_logps(policy, build_row(PAIRS)).token_logps_A.sum().backward()

    second = {name: p for name, p in policy.trainable().items() if "lora_B" in name}
    assert len(second) >= 2 * 4
    assert all(p.grad.norm() > 0 for p in second.values())


@needs_it
def test_quantised_weights_take_four_bits_and_their_scales(base: Path) -> None:
    """A byte for two weights; scales are 8 bits for 64 weights, and 32 for 256 of those."""
    policy = load(base)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    assert weight.numel() == 32 * 48 // 2
    state = weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
    assert (state.absmax.dtype, state.absmax.numel()) == (torch.uint8, 32 * 48 // 64)
    assert state.state2.blocksize == 256


@needs_it
def test_policy_starts_as_its_quantised_reference(base: Path) -> None:
    """Bit for bit, and so again after steps of training, its adapters switched off; only adapters have moved."""
    reference = logps(load(base))
    policy = load(base, lora=LORA, trainable=True)
    assert torch.equal(logps(policy), reference)
    assert set(policy.trainable()) == {name for name, _ in policy.model.named_parameters() if "lora_" in name}
    pairs = with_reference(policy, PAIRS)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    config = TrainConfig(beta=0.5, row_tokens=64, batch_pairs=4)
    losses = [
        float(train_step(policy, optimizer, pairs, config, Ranks(), step=step, learning_rate=3.0).sums[0])
        for step in range(6)
    ]
    assert losses[-1] < losses[0] - 0.1
    with policy.reference():
        assert torch.equal(logps(policy), reference)
    assert not torch.equal(logps(policy), reference)


@needs_it
def test_gradient_is_that_of_the_weights_written_out(base: Path, tmp_path: Path) -> None:
    """The quantised policy and a plain one with the same numbers differ in where the numbers are kept alone."""
    quantised = move(load(base, lora=LORA, trainable=True))
    save_policy(quantised, tmp_path, None)
    config = ModelConfig(path=str(base), quantization="nf4")
    _without_update(tmp_path)
    merged_model(config, tmp_path).save_pretrained(tmp_path / "base")
    plain = move(load(tmp_path / "base", quantized=False, lora=LORA, trainable=True))
    gradients = []
    for policy in (quantised, plain):
        row_logps(policy, build_row(PAIRS)).token_logps_A.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    assert gradients[0].norm() > 1
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def _without_update(output: Path) -> None:
    """Makes the saved adapter's second factors zero."""
    from safetensors.torch import load_file, save_file

    file = output / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}, file)


@needs_it
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_computes_what_was_trained_on_the_quantised_base(tmp_path: Path, family: str) -> None:
    """Plain weights, to rounding the policy's logits; merged into the weights as they were before, another model."""
    folder = write(tmp_path / "base", FAMILIES[family])
    policy = move(load(folder, lora=LORA, trainable=True))
    save_policy(policy, tmp_path, None)
    wanted = logits(policy.model)

    merged = merged_model(ModelConfig(path=str(folder), quantization="nf4"), tmp_path)

    assert (logits(merged) - wanted).norm() <= 1e-5 * wanted.norm()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    on_the_unquantised = merged_model(ModelConfig(path=str(folder)), tmp_path)
    assert (logits(on_the_unquantised) - wanted).norm() > 1e-2 * wanted.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = load(tmp_path / "merged", quantized=False)
    assert (logits(again.model) - wanted).norm() <= 1e-5 * wanted.norm()


@needs_it
def test_adapter_goes_on_over_a_quantised_base(base: Path, tmp_path: Path) -> None:
    """One that was trained over the base as it was; the reference is the quantised base with it."""
    save_policy(move(load(base, quantized=False, lora=LORA, trainable=True)), tmp_path, None)
    config = ModelConfig(path=str(base), quantization="nf4", adapter=str(tmp_path / "adapter"))
    policy = load_policy(config, device=CPU, lora=LoraConfig(), trainable=True)
    reference = logps(load_policy(config, device=CPU))
    assert torch.equal(logps(policy), reference)
    move(policy)
    with policy.reference():
        assert torch.equal(logps(policy), reference)
    assert not torch.equal(logps(policy), reference)


@needs_it
def test_quantised_weights_are_never_trained_themselves(base: Path) -> None:
    """Nor may a full training have them for its reference."""
    for options in ({"trainable": True}, {"frozen_base": False}):
        with pytest.raises(ModelError, match=r"Quantised weights cannot be trained.*set train\.lora"):
            load(base, **options)


@needs_it
@pytest.mark.parametrize("quantized", [True, False])
def test_model_that_is_stored_quantised_is_refused(base: Path, tmp_path: Path, quantized: bool) -> None:
    """Of what it was made is not to be known, and it could not be merged into."""
    load(base).model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"stored quantised.*bitsandbytes.*the folder of the model that these were"):
        load(tmp_path, quantized=quantized)


# Through the stages.


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tmp_path_factory.mktemp("stages"))
    return replace(config, model=replace(config.model, quantization="nf4"))


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> Artifact:
    return prepare(config, InProcess())


@needs_it
def test_flow_scores_trains_and_judges_on_the_quantised_base(config: RunConfig, pairs: Artifact) -> None:
    """The first step has no drift, the policy learns, and what would be registered computes what was judged."""
    local = InProcess()
    scored = score_reference(config, pairs, local)
    made = train(config, scored, local)
    first = json.loads((made.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(first["drift/chosen"]) < 1e-4
    assert evaluate(config, scored, made, local).record.details["learned"] is True
    policy = load_policy(config.model, device=CPU, weights=made.path)
    wanted = logits(policy.model)
    assert (logits(merged_model(config.model, made.path)) - wanted).norm() <= 1e-5 * wanted.norm()

    plain = replace(config, model=replace(config.model, quantization=None))
    of_plain = score_reference(plain, pairs, local)
    chosen = [
        np.concatenate(Split(s, "train").table()["reference_chosen_logps"].to_pylist()) for s in (scored, of_plain)
    ]
    assert np.abs(chosen[0] - chosen[1]).mean() > 0.01
    with pytest.raises(ConfigError, match=r"another model than .*, model\.quantization=nf4"):
        train(config, of_plain, local)
