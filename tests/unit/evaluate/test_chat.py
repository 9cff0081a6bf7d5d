"""A model in a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dpo_train.config import ModelConfig
from dpo_train.data.pairs import Message
from dpo_train.data.tokens import TokenOptions
from dpo_train.errors import UserError
from dpo_train.evaluate.chat import Speaker
from dpo_train.model.load import load_policy


def speaker(folder: Path, *, seed: int = 0, temperature: float = 0.7, **options: Any) -> Speaker:
    """The tiny model, of whose limits on pairs a conversation must not hear."""
    return Speaker(
        load_policy(ModelConfig(path=str(folder)), device=torch.device("cpu")),
        AutoTokenizer.from_pretrained(folder),
        TokenOptions(max_prompt_tokens=4, max_answer_tokens=1, **options),
        temperature=temperature,
        max_tokens=8,
        seed=seed,
    )


def test_answers_become_part_of_what_is_read(model_folder: Path) -> None:
    """The second answer is the greedy continuation of the whole conversation as the chat template writes it."""
    one = speaker(model_folder, temperature=0.0)
    first, second = one.answer("tell me"), one.answer("and the dog")

    assert [(turn.role, turn.content) for turn in one.history] == [
        ("user", "tell me"), ("assistant", first.text), ("user", "and the dog"), ("assistant", second.text),
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    turns = [{"role": turn.role, "content": turn.content} for turn in one.history[:3]]
    ids_BT = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = load_policy(ModelConfig(path=str(model_folder)), device=torch.device("cpu")).model
    output_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output_BT[0, ids_BT.shape[1] :], skip_special_tokens=True).strip() == second.text


def test_same_seed_says_the_same_and_another_one_does_not(model_folder: Path) -> None:
    """Also after the history was dropped: the randomness hangs on the seed and the number of the turn."""
    one, other = speaker(model_folder), speaker(model_folder, seed=1)
    said = one.answer("tell me")
    assert other.answer("tell me") != said
    one.history = ()
    assert one.answer("tell me") == said
    assert one.answer("tell me") != said


def test_cut_answer_is_known_as_one(model_folder: Path) -> None:
    """Eight tokens of a random model that hardly ever ends by itself."""
    assert speaker(model_folder).answer("tell me").truncated


def test_too_long_conversation_is_refused_and_stays_as_it_was(model_folder: Path) -> None:
    """The model has 256 positions; 300 words take more."""
    one = speaker(model_folder)
    one.answer("tell me")
    before = one.history
    with pytest.raises(UserError, match=r"too long for this model\. Got: \d+ tokens\. Expected: fewer than its 256"):
        one.answer("cat " * 300)
    assert one.history == before


def test_template_that_refuses_is_quoted(model_folder: Path) -> None:
    """A template is a program that may refuse a conversation, here its second turn."""
    template = "{% if messages | length > 3 %}{{ raise_exception('one turn only') }}{% endif %}" + str(
        AutoTokenizer.from_pretrained(model_folder).chat_template
    )
    one = speaker(model_folder, chat_template=template)
    one.answer("tell me")
    with pytest.raises(UserError, match="one turn only"):
        one.answer("more")


def test_plain_texts_are_continued(model_folder: Path) -> None:
    """Without a chat template the model reads what was said, one behind the other."""
    one = speaker(model_folder, template="plain", temperature=0.0)
    one.history = (Message("user", "the cat"), Message("assistant", " is"))
    other = speaker(model_folder, template="plain", temperature=0.0)
    assert one.answer(" kind").text == other.answer("the cat is kind").text
