"""Adapters that a model has already, adapters saved and merged, and modules that are not trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_train.config import LoraConfig, ModelConfig, TrainConfig
from dpo_train.data.adapter import ADAPTER_WEIGHTS, adapter_digest, adapter_folder
from dpo_train.data.folder import ADAPTER_CONFIG, model_folder
from dpo_train.errors import ConfigError, ModelError
from dpo_train.model.load import Policy, load_policy, merged_model, save_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import check_layout, row_logps
from tests.tiny import random_pairs, tiny_tokenizer
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CPU = torch.device("cpu")
PAIRS = random_pairs(4, vocabulary=VOCABULARY)
LORA = LoraConfig(rank=3, alpha=6.0, target_modules=("q_proj", "up_proj"))
CONFIG = TrainConfig(beta=0.5, row_tokens=64, learning_rate=1e-2, weight_decay=0.1, batch_pairs=4)


def load(folder: Path, *, adapter: Path | None = None, **options: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder), adapter=adapter and str(adapter)), device=CPU, **options)


@torch.no_grad()
def logps(policy: Policy) -> Tensor:
    return row_logps(policy, build_row(PAIRS)).token_logps_A


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(3, 40)[None]).logits
    return found


def move(policy: Policy, seed: int = 1) -> Policy:
    """A made-up training: every trainable weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def saved(policy: Policy, output: Path) -> Path:
    """The folder of its adapter."""
    save_policy(policy, output, None)
    return output / "adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base"), FAMILIES["llama"])


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 3 that moves log-probs by nats."""
    return saved(move(load(base, lora=LORA, trainable=True)), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def changed(adapter: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "changed"))


def set_keys(folder: Path, **keys: Any) -> Path:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return folder


# What is saved.


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_alone_and_merge_into_what_the_policy_computed(tmp_path: Path, family: str) -> None:
    """Tied matrices, convolutions stored transposed and experts included: no weight of the base in the file, and merged
    logits equal to 1e-5."""
    folder = write(tmp_path / "base", FAMILIES[family])
    policy = move(load(folder, lora=LoraConfig(rank=2), trainable=True))
    output = saved(policy, tmp_path / "out")
    assert sorted(path.name for path in output.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    with safe_open(output / ADAPTER_WEIGHTS, framework="pt") as file:
        sizes = {name: torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()}  # noqa: SIM118
    assert all(".lora_A." in name or ".lora_B." in name for name in sizes)
    assert sum(sizes.values()) == sum(p.numel() for p in policy.trainable().values())

    merged = merged_model(ModelConfig(path=str(folder)), tmp_path / "out")

    wanted = logits(policy.model)
    assert (logits(merged) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (logits(load(folder).model) - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merged_model_is_a_model_folder_like_any_other(tmp_path: Path, family: str) -> None:
    """Written and read by transformers alone: plain, tied, and transposed weights."""
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "base", FAMILIES[family])
    policy = move(load(folder, lora=LoraConfig(rank=2), trainable=True))
    saved(policy, tmp_path / "out")
    merged_model(ModelConfig(path=str(folder)), tmp_path / "out").save_pretrained(tmp_path / "merged")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    wanted = logits(policy.model)
    assert (logits(again) - wanted).norm() <= 1e-5 * wanted.norm()
    files = (path for name in ("base", "merged") for path in (tmp_path / name).glob("*.safetensors"))
    names = [set(load_file(path)) for path in files]
    assert names[0] == names[1]


def test_saved_adapter_lists_modules_in_one_order(adapter: Path) -> None:
    """PEFT holds names in a set, whose order changes from process to process; outputs must be the same bytes."""
    assert json.loads((adapter / ADAPTER_CONFIG).read_text())["target_modules"] == ["q_proj", "up_proj"]


# Going on from an adapter.


def test_training_starts_as_the_model_with_its_adapter(base: Path, adapter: Path) -> None:
    """The reference and the policy's start are one, bit for bit; the base alone is another."""
    reference = logps(load(base, adapter=adapter))
    start = load(base, adapter=adapter, lora=LoraConfig(), trainable=True)
    assert torch.equal(logps(start), reference)
    assert (logps(load(base)) - reference).norm() > 0.1
    assert len(start.trainable()) == 2 * 2 * 2
    assert {min(p.shape) for p in start.trainable().values()} == {3}
    check_layout(start)


def test_reference_of_a_policy_that_went_on_is_where_it_began(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Neither the base nor what was trained; afterwards the policy is back, also as it is loaded from its output."""
    policy = load(base, adapter=adapter, lora=LoraConfig(), trainable=True)
    start, trainable = logps(policy), set(policy.trainable())
    moved = logps(move(policy, seed=2))
    saved(policy, tmp_path)
    for found in (policy, load(base, adapter=adapter, weights=tmp_path)):
        assert torch.equal(logps(found), moved)
        with found.reference():
            assert torch.equal(logps(found), start)
        assert torch.equal(logps(found), moved)
    assert not torch.equal(start, moved)
    assert set(policy.trainable()) == trainable


def test_what_went_on_is_saved_and_merged_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The new adapter stands for the old one: it goes onto the base, not onto the base with the old one."""
    policy = move(load(base, adapter=adapter, lora=LoraConfig(), trainable=True), seed=2)
    saved(policy, tmp_path)
    merged = merged_model(ModelConfig(path=str(base), adapter=str(adapter)), tmp_path)
    assert (logits(merged) - logits(policy.model)).norm() <= 1e-5 * logits(policy.model).norm()
    assert torch.equal(logps(load(base, weights=tmp_path)), logps(policy))


def test_full_training_begins_with_the_adapter_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    """All weights are trained, and the reference of a full training is computed from the same merged weights."""
    full = load(base, adapter=adapter, trainable=True)
    assert full.adapters is None
    assert len(full.trainable()) == len(list(load(base).model.parameters()))
    assert torch.equal(logps(full), logps(load(base, adapter=adapter, frozen_base=False)))
    assert torch.allclose(logps(full), logps(load(base, adapter=adapter)), rtol=1e-5, atol=1e-5)
    save_policy(move(full), tmp_path, tiny_tokenizer())
    assert torch.equal(logps(load(base, adapter=adapter, weights=tmp_path)), logps(full))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_from_an_adapter_of_ours(tmp_path: Path, family: str) -> None:
    """What PEFT writes of convolutions and of experts is read again, and trained on."""
    folder = write(tmp_path / "base", FAMILIES[family])
    policy = move(load(folder, lora=LoraConfig(rank=2), trainable=True))
    again = load(folder, adapter=saved(policy, tmp_path / "out"), lora=LoraConfig(), trainable=True)
    assert torch.equal(logps(again), logps(policy))
    assert [p.shape for p in again.trainable().values()] == [p.shape for p in policy.trainable().values()]


def test_loading_an_adapter_leaves_the_random_state(base: Path, adapter: Path) -> None:
    """PEFT draws weights before it reads them."""
    before = torch.get_rng_state()
    load(base, adapter=adapter)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=4), r"another rank.*Got: lora\.rank=4\. Expected: 3\. What to do: leave lora\.rank out"),
        (LoraConfig(alpha=8), r"another alpha.*Got: lora\.alpha=8\. Expected: 6"),
        (LoraConfig(target_modules=("q_proj",)), r"other target modules.*differ in 2 modules.*\['q_proj', 'up_proj'\]"),
        (LoraConfig(target_modules=("q_proj", "no_such")), r"no such module.*lora\.target_modules: no_such"),
    ],
)
def test_shape_that_contradicts_the_adapter_is_refused(
    base: Path, adapter: Path, lora: LoraConfig, message: str
) -> None:
    """Its own shape is trained; a key that says otherwise would not be heard."""
    with pytest.raises((ConfigError, ModelError), match=message):
        load(base, adapter=adapter, lora=lora, trainable=True)


@pytest.mark.parametrize(
    "lora", [LORA, replace(LORA, target_modules=("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "q_proj"))]
)
def test_shape_that_says_the_same_is_taken(base: Path, adapter: Path, lora: LoraConfig) -> None:
    """Modules are compared, not the names that mean them."""
    assert torch.equal(
        logps(load(base, adapter=adapter, lora=lora, trainable=True)), logps(load(base, adapter=adapter))
    )


# What is no adapter that we can train.


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\]'),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"peft_type": "IA3"}, 'peft_type="IA3"'),
        ({"a_key_that_peft_may_come_to_have": 1}, "a_key_that_peft_may_come_to_have=1"),
        ({"use_dora": True, "bias": "all"}, 'use_dora=true, bias="all"|bias="all", use_dora=true'),
    ],
)
def test_adapter_that_is_more_than_a_low_rank_update_is_refused_by_name(
    base: Path, changed: Path, keys: dict[str, Any], named: str
) -> None:
    """Log-probs, the reference and merging know the plain update alone; all keys are named at once."""
    with pytest.raises(ModelError, match=rf"of a kind that cannot be trained on\. Got: ({named})\."):
        load(base, adapter=set_keys(changed, **keys))


def test_real_dora_adapter_is_refused_by_its_weights_too(base: Path, tmp_path: Path) -> None:
    """Its magnitudes stand in the file whatever the config says."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    dora = get_peft_model(load(base).model, PeftLoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="use_dora=true"):
        load(base, adapter=tmp_path)
    with pytest.raises(ModelError, match=r"2 weights that the model has no place for.*lora_magnitude_vector"):
        load(base, adapter=set_keys(tmp_path, use_dora=False))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapter_on_vocabulary_or_embedding_is_refused(tmp_path: Path, module: str, family: str) -> None:
    """An existing one as well as a fresh one. Of tied matrices either name means both."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    folder = write(tmp_path / "base", FAMILIES[family])
    peft_config = PeftLoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM")
    made = get_peft_model(load(folder).model, peft_config)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    blind = module == "lm_head" or family == "qwen2"
    message = rf"LoRA on the {'vocabulary matrix' if blind else 'input embedding'} is not supported.*{module}"
    with pytest.raises(ModelError, match=message):
        load(folder, adapter=tmp_path / "adapter")
    with pytest.raises(ModelError, match=message):
        load(folder, lora=LoraConfig(target_modules=(module,)), trainable=True)


def test_pickled_adapter_is_not_read(base: Path, changed: Path) -> None:
    """A pickle may run code."""
    torch.save(load_file(changed / ADAPTER_WEIGHTS), changed / "adapter_model.bin")
    (changed / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"not an adapter folder.*no adapter_model\.safetensors.*a pickle"):
        load(base, adapter=changed)


def _of_another_width(changed: Path) -> None:
    tensors = load_file(changed / ADAPTER_WEIGHTS)
    save_file({name: torch.cat([t, t], dim=-1) for name, t in tensors.items()}, changed / ADAPTER_WEIGHTS)


def _without_a_layer(changed: Path) -> None:
    tensors = load_file(changed / ADAPTER_WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, changed / ADAPTER_WEIGHTS)


def _with_a_third_layer(changed: Path) -> None:
    tensors = load_file(changed / ADAPTER_WEIGHTS)
    more = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **more}, changed / ADAPTER_WEIGHTS)


def _of_other_modules(changed: Path) -> None:
    set_keys(changed, target_modules=["c_attn"])


def _cut_short(changed: Path) -> None:
    content = (changed / ADAPTER_WEIGHTS).read_bytes()
    (changed / ADAPTER_WEIGHTS).write_bytes(content[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_of_another_width, r"does not fit the model"),
        (_without_a_layer, r"4 weights that the adapter lacks, such as .*layers\.1\."),
        (_with_a_third_layer, r"4 weights that the model has no place for, such as .*layers\.2\."),
        (_of_other_modules, r"does not fit the model.*c_attn"),
        (_cut_short, r"adapter_model\.safetensors cannot be read"),
    ],
)
def test_adapter_of_another_model_is_refused(
    base: Path, changed: Path, damage: Callable[[Path], None], message: str
) -> None:
    """PEFT would only warn, and train what is left."""
    damage(changed)
    with pytest.raises(ModelError, match=message):
        load(base, adapter=changed)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "is not a mapping"), (None, "is not an adapter folder")]
)
def test_folder_that_is_no_adapter_is_refused(changed: Path, content: str | None, message: str) -> None:
    """Its config is broken, or not there."""
    if content is None:
        (changed / ADAPTER_CONFIG).unlink()
    else:
        (changed / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(ModelError, match=message):
        adapter_folder(str(changed))
    with pytest.raises(ModelError, match="There is no adapter folder"):
        adapter_folder(str(changed / "absent"))


def test_adapter_given_as_the_model_is_told_from_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    """The message says which key it belongs under; transformers would load whatever base the adapter names."""
    with pytest.raises(ModelError, match=r"holds an adapter, not a model.*model\.adapter to this one"):
        model_folder(str(adapter))
    both = Path(shutil.copytree(base, tmp_path / "both"))
    shutil.copy(adapter / ADAPTER_CONFIG, both)
    with pytest.raises(ModelError, match="holds an adapter"):
        model_folder(str(both))


def test_digest_is_of_what_is_loaded(adapter: Path, changed: Path) -> None:
    """Not of the optimiser that a trainer left beside it; another number of the adapter is another digest."""
    (changed / "optimizer.pt").write_bytes(b"of a trainer")
    assert adapter_digest(changed) == adapter_digest(adapter)
    set_keys(changed, lora_alpha=7.0)
    assert adapter_digest(changed) != adapter_digest(adapter)
    save_file({n: 2 * t for n, t in load_file(adapter / ADAPTER_WEIGHTS).items()}, changed / ADAPTER_WEIGHTS)
    assert len({adapter_digest(changed), adapter_digest(set_keys(changed, lora_alpha=6.0))}) == 2
