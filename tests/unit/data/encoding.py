"""Pairs and encoders that the tests of tokens share."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st

from dpo_train.data.pairs import Message, PreferencePair
from dpo_train.data.tokens import EncodedPair, PairTokenizer, TokenOptions
from tests.tiny import tiny_tokenizer
from tests.unit.data.tokenizer_kinds import make

TOKENIZER = tiny_tokenizer()
# Lone surrogates never come here (data/validate.py), and the special tokens have tests of their own.
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \naeö"), min_size=1, max_size=20)
ANSWER = TEXT.filter(str.strip)
# Qwen3's way: earlier thoughts are dropped, and without thinking the prompt ends with empty ones.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.thoughts %}<think>\n{{ m.thoughts }}\n"
    "</think>\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n"
    "{% elif thinking is defined %}<think>\n{% endif %}{% endif %}"
)


def pair_of(prompt: str | tuple[Message, ...], chosen: str | Message, rejected: str | Message) -> PreferencePair:
    """A pair of one user turn, or of these turns."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    answers = [Message("assistant", answer) if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return PreferencePair(turns, *answers, group="g")


def encoder(tokenizer: Any = TOKENIZER, **options: Any) -> PairTokenizer:
    """One with wide limits, unless they are given."""
    return PairTokenizer(tokenizer, TokenOptions(**{"max_prompt_tokens": 999, "max_answer_tokens": 999} | options))


def encode(tokenizer: PairTokenizer, *texts: Any) -> EncodedPair:
    """Of a pair that is not rejected."""
    outcome = tokenizer.encode(pair_of(*texts))
    assert isinstance(outcome, EncodedPair), outcome
    return outcome


@functools.cache
def kept(kind: str, template: str | None) -> tuple[Any, PairTokenizer]:
    """A tokenizer of KINDS and its encoder, made once for all examples; None is plain text."""
    tokenizer = make(kind, template)
    return tokenizer, encoder(tokenizer, template="chat" if template else "plain")


def ids_of(outcome: EncodedPair) -> list[list[int]]:
    """Prompt, chosen, rejected."""
    return [
        outcome.tokens.prompt_ids.tolist(),
        outcome.tokens.chosen_ids.tolist(),
        outcome.tokens.rejected_ids.tolist(),
    ]
