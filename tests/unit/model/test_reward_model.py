"""Reward models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dpo_train.errors import ModelError, RunError
from dpo_train.model.reward_model import RewardModel
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, PAD, tiny_model, tiny_tokenizer
from tests.unit.model.reward_models import tiny_reward_model

CPU = torch.device("cpu")
PROMPT = [{"role": "user", "content": "tell me about the cat"}]
CONVERSATIONS = [(PROMPT, "it is kind"), (PROMPT, "it is rude and cold and grim and sour"), (PROMPT * 5, ""), ([], "x")]


@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_batch_gives_what_each_gives_alone(tmp_path: Path, pad: str | None) -> None:
    """Whatever pads: a token of its own, the end token, in which each conversation ends too, or none at all."""
    folder = tiny_reward_model(tmp_path, pad_token=pad)
    model = RewardModel(folder, device=CPU, max_tokens=256)

    together = model(CONVERSATIONS)

    assert together == pytest.approx([model([each])[0] for each in CONVERSATIONS], rel=5e-6)
    assert len(set(together)) == len(CONVERSATIONS)


def test_reward_is_the_models_own(tmp_path: Path) -> None:
    """What transformers gives for the text of the chat template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_reward_model(tmp_path)
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    text = f"{BOS}user\ntell me about the cat{EOS}\n{BOS}assistant\nit is kind{EOS}\n"

    with torch.no_grad():
        expected = plain(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()

    assert RewardModel(folder, device=CPU, max_tokens=256)([CONVERSATIONS[0]]) == pytest.approx([expected], rel=1e-5)


def test_long_conversation_loses_its_start(tmp_path: Path) -> None:
    """What is left is the same as of a shorter conversation with the same end; the answer stays."""
    model = RewardModel(tiny_reward_model(tmp_path, chat_template=None), device=CPU, max_tokens=10)
    long = [{"role": "user", "content": "song " * 100 + "the sea and the sun and the hill and the lamp"}]
    longer = [{"role": "user", "content": "rain " * 100 + "the sea and the sun and the hill and the lamp"}]
    one, same, other = model([(long, " it is warm"), (longer, " it is warm"), (long, " it is cold")])
    assert one == pytest.approx(same, rel=5e-7)
    assert one != pytest.approx(other, rel=1e-3)


def test_length_is_what_the_model_reads(tmp_path: Path) -> None:
    """Positions beyond the model's own are never asked for."""
    model = RewardModel(tiny_reward_model(tmp_path), device=CPU, max_tokens=10_000)
    assert model._max_tokens == 256
    assert len(model._encode([{"role": "user", "content": "song " * 1000}], "x")["input_ids"]) == 256


def test_positions_that_begin_behind_the_padding_are_fewer(tmp_path: Path) -> None:
    """RoBERTa's 40 positions begin at the padding's index + 1, here 1: 39 tokens, of which the last has the last."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = tiny_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel(tmp_path, device=CPU, max_tokens=10_000)

    assert len(model._encode(PROMPT * 20, "x")["input_ids"]) == 39
    assert all(map(math.isfinite, model([(PROMPT * 20, "x"), (PROMPT, "x")])))


def test_conversation_without_a_token_has_no_reward(tmp_path: Path) -> None:
    """An empty answer to nothing, without a template: NaN, and the others get what they get alone."""
    model = RewardModel(tiny_reward_model(tmp_path, chat_template=None), device=CPU, max_tokens=64)
    nothing, other = model([([], ""), (PROMPT, "x")])
    assert math.isnan(nothing)
    assert [other] == pytest.approx(model([(PROMPT, "x")]), rel=1e-6)


def test_model_without_one_output_is_refused(tmp_path: Path) -> None:
    """Three classes are no reward."""
    folder = tiny_reward_model(tmp_path, num_labels=3)
    with pytest.raises(ModelError, match=r"does not give one reward.*num_labels=3"):
        RewardModel(folder, device=CPU, max_tokens=64)


def test_language_model_is_refused(tmp_path: Path) -> None:
    """Its head would be drawn by lot, and so would the rewards."""
    folder = tiny_model(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "reward"}}))
    with pytest.raises(ModelError, match=r"rewards nothing.*score\.weight"):
        RewardModel(folder, device=CPU, max_tokens=64)


def test_folder_without_a_tokenizer_or_weights_is_refused(tmp_path: Path) -> None:
    """The message names what is missing."""
    folder = tiny_reward_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        RewardModel(folder, device=CPU, max_tokens=64)


def test_template_that_refuses_is_named(tmp_path: Path) -> None:
    """A model that knows no system turn says so."""
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    )
    model = RewardModel(tiny_reward_model(tmp_path, chat_template=template), device=CPU, max_tokens=64)
    with pytest.raises(RunError, match=r"refuses a prompt: no system turn.*roles system, user, assistant"):
        model([([{"role": "system", "content": "be kind"}, *PROMPT], "x")])
