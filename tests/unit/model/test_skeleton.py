"""Models without weights that are filled afterwards, against ``from_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.errors import ModelError
from dpo_train.model.load import Policy, load_policy, save_policy
from dpo_train.model.skeleton import Skeleton, WholeModelNeededError
from tests.unit.model.families import FAMILIES, write

CPU = torch.device("cpu")
LORA = LoraConfig(rank=2)


def _filled(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    skeleton = Skeleton()
    model = skeleton.build(folder, ModelConfig(path=str(folder)), dtype, CPU)
    skeleton.drop_memory()
    skeleton.fill()
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    """Weights and all buffers."""
    return dict(model.state_dict()) | dict(model.named_buffers())


def _assert_same(got: Any, wanted: Any) -> None:
    tensors = _tensors(got)
    assert tensors.keys() == _tensors(wanted).keys()
    for name, tensor in _tensors(wanted).items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    # Tied weights are one parameter.
    assert len(list(got.parameters())) == len(list(wanted.parameters()))


def _change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(change({name: tensor.clone() for name, tensor in tensors.items()}), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_skeleton_is_the_model(tmp_path: Path, family: str) -> None:
    """Weights and buffers bit for bit, and it will be stored under the same names; experts and renamed weights too."""
    folder = write(tmp_path, FAMILIES[family])
    got, wanted = _filled(folder), AutoModelForCausalLM.from_pretrained(folder)
    _assert_same(got, wanted)
    assert [str(rule) for rule in got._weight_conversions] == [str(rule) for rule in wanted._weight_conversions]
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize("has_own", [True, False])
def test_generation_config_is_the_models_own(tmp_path: Path, has_own: bool) -> None:
    """It is saved with the trained model again; without one it is made of the model's config."""
    folder = write(tmp_path, FAMILIES["llama"])
    if has_own:
        GenerationConfig(do_sample=True, temperature=0.25, eos_token_id=[7, 8]).save_pretrained(folder)
    else:
        (folder / "generation_config.json").unlink()
    got, wanted = _filled(folder).generation_config, AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert got.to_dict() == wanted.to_dict()
    assert (got.temperature == 0.25) == has_own


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path, family: str) -> None:
    """A layer's experts may lie in different files."""
    folder = write(tmp_path / "one", FAMILIES[family])
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "many", max_shard_size=15_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    _assert_same(_filled(tmp_path / "many"), AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_take_the_dtype_that_is_asked_for(tmp_path: Path, stored: str, wanted: str) -> None:
    """fp32 masters of bf16 files, and a bf16 base of fp32 files."""
    folder = write(tmp_path, lambda: FAMILIES["llama"]().to(getattr(torch, stored)))
    dtype = getattr(torch, wanted)
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == getattr(torch, stored)
    model = _filled(folder, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    _assert_same(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_are_true(tmp_path: Path, rope: dict[str, Any]) -> None:
    """No checkpoint holds them; they are computed when the model is made, and must not be left empty."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, rope_parameters={"rope_theta": 10_000.0, **rope},
    )  # fmt: skip
    folder = write(tmp_path, lambda: LlamaForCausalLM(config))
    model = _filled(folder)
    assert model.model.rotary_emb.inv_freq.abs().sum() > 0.5
    _assert_same(model, AutoModelForCausalLM.from_pretrained(folder))


def test_names_without_the_decoders_prefix_are_known(tmp_path: Path) -> None:
    """As GPT-2 lies on the hub: no "transformer." before its names, and masks of long ago among the weights."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    folder = write(tmp_path, lambda: GPT2LMHeadModel(config))
    _change_weights(folder, lambda tensors: {
        **{name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        "h.0.attn.bias": torch.ones(1, 1, 64, 64),
    })  # fmt: skip
    _assert_same(_filled(folder), AutoModelForCausalLM.from_pretrained(folder))


def test_tied_weight_that_is_stored_twice_is_taken_once(tmp_path: Path) -> None:
    """Some tools write both names."""
    folder = write(tmp_path, FAMILIES["qwen2"])
    _change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = _filled(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _assert_same(model, AutoModelForCausalLM.from_pretrained(folder))


def test_tied_weight_that_is_stored_as_two_needs_the_whole_model(tmp_path: Path) -> None:
    """transformers then makes it two, against the config."""
    folder = write(tmp_path, FAMILIES["qwen2"])
    _change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(WholeModelNeededError, match=r"lm_head\.weight are tied by its config and differ in its files"):
        _filled(folder)


def test_stored_quantised_weights_need_the_whole_model(tmp_path: Path) -> None:
    """What then happens is for ``load_policy`` to say."""
    folder = write(tmp_path, FAMILIES["llama"])
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WholeModelNeededError, match="stored quantised"):
        _filled(folder)


def _without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", _without("model.norm.weight"), r"Got: no model\.norm\.weight\."),
        ("llama", lambda t: {k: v for k, v in t.items() if "norm" not in k}, r"Got: no .*norm\.weight, and 4 more"),
        ("mixtral", lambda t: {k: v for k, v in t.items() if "layers.1.block_sparse_moe.experts" not in k},
         r"Got: no model\.layers\.1\.mlp\.experts\.\w+, and 1 more"),
        ("mixtral", _without("model.layers.0.block_sparse_moe.experts.3.w2.weight"),
         r"Got: model\.layers\.0\.mlp\.experts\.down_proj is made of 3 tensors\. Expected: 4 of each kind"),
        ("llama", lambda t: {**t, "model.layers.7.norm.weight": torch.ones(2)},
         r"Got: 1 that the model has no place for, such as model\.layers\.7\.norm\.weight"),
        ("llama", lambda t: {**t, "model.norm.weight": torch.ones(31)},
         r"Got: model\.norm\.weight has shape \[31\]\. Expected: \[32\]"),
    ],
    ids=["one missing", "several missing", "experts missing", "an expert missing", "one too many", "another shape"],
)  # fmt: skip
def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    """``from_pretrained`` would draw what is missing at random and go on."""
    folder = _change_weights(write(tmp_path, FAMILIES[family]), change)
    with pytest.raises(ModelError, match=r"do not fit its config \(\w+ForCausalLM\)\. " + message):
        _filled(folder)


def _policy(folder: Path, config: ModelConfig, lora: LoraConfig | None, seed: int) -> tuple[Policy, Policy]:
    """On a skeleton, and as always."""
    skeleton = Skeleton()
    options: dict[str, Any] = {"device": CPU, "lora": lora, "trainable": True, "seed": seed}
    policy = load_policy(config, **options, base=skeleton.build)
    skeleton.drop_memory()
    skeleton.fill()
    return policy, load_policy(config, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_adapters_on_a_skeleton_are_those_on_the_model(tmp_path: Path, family: str) -> None:
    """They are drawn from the seed in the same order, though there are no weights yet."""
    folder = write(tmp_path, FAMILIES[family])
    got, wanted = _policy(folder, ModelConfig(path=str(folder)), LORA, seed=5)
    _assert_same(got.model, wanted.model)
    assert got.trainable().keys() == wanted.trainable().keys()
    assert all("lora_" in name for name in got.trainable())


def test_adapter_that_the_model_has_is_put_on_a_skeleton(tmp_path: Path) -> None:
    """Its weights come from its folder, the base's from the model's."""
    folder = write(tmp_path / "base", FAMILIES["llama"])
    first = load_policy(ModelConfig(path=str(folder)), device=CPU, lora=LORA, trainable=True)
    for parameter in first.trainable().values():
        parameter.data += 1.0
    save_policy(first, tmp_path, None)
    config = ModelConfig(path=str(folder), adapter=str(tmp_path / "adapter"))
    got, wanted = _policy(folder, config, LORA, seed=0)
    _assert_same(got.model, wanted.model)
    _assert_same(got.model, first.model)


def test_frozen_modules_stay_frozen_on_a_skeleton(tmp_path: Path) -> None:
    """Which weights are trained is decided before they are there."""
    folder = write(tmp_path, FAMILIES["qwen2"])
    skeleton = Skeleton()
    config = ModelConfig(path=str(folder))
    policy = load_policy(config, device=CPU, trainable=True, frozen=("embed_tokens", "layers.0"), base=skeleton.build)
    skeleton.drop_memory()
    skeleton.fill()
    held = {name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad}
    assert "model.embed_tokens.weight" in held
    assert {name for name in held if "layers" in name} == {
        name for name, _ in policy.model.named_parameters() if "layers.0." in name
    }
