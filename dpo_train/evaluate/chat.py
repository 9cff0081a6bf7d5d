"""A model in a conversation: it reads the turns as training did, and answers by the sampler of the evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dpo_train.data.pairs import Ids, Message, PreferencePair, Rejection
from dpo_train.data.tokens import PairTokenizer, TokenOptions
from dpo_train.errors import UserError
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import PROMPTS_SCHEMA
from dpo_train.model.load import Policy

_NO_LIMIT = 1 << 30


class Said(NamedTuple):
    """An answer, and whether it was cut off at the longest length."""

    text: str
    truncated: bool


class Speaker:
    """One model with its own side of the conversation.

    Of equal models and equal conversations the answers are equal, because the randomness depends on the seed and the
    number of the turn alone.

    Args:
        policy: the model.
        tokenizer: its own.
        options: how prompts become tokens; their limits are left out.
        temperature: of the answers, 0 being greedy.
        max_tokens: longest answer.
        seed: of all answers.

    Raises:
        ModelError, ConfigError: the options do not fit the tokenizer, see PairTokenizer.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        options: TokenOptions,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        unlimited = dataclasses.replace(options, max_prompt_tokens=_NO_LIMIT, max_answer_tokens=_NO_LIMIT)
        self._reader = PairTokenizer(tokenizer, unlimited)
        self._positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
        self._temperature = temperature
        self.history: tuple[Message, ...] = ()
        _, end = self._read([Message("user", "a")])
        self._sampler = AnswerPrompts(policy, tokenizer, max_tokens=max_tokens, seed=seed, batch=1, end_ids=[end])

    def answer(self, text: str) -> Said:
        """The model's answer to what the user says next; both become part of the conversation.

        Raises:
            UserError: the chat template refuses the conversation, or it has grown too long for the model.
        """
        turns = (*self.history, Message("user", text))
        prompt_ids, _ = self._read(turns)
        if len(prompt_ids) >= self._positions:
            raise UserError(
                "The conversation is too long for this model",
                got=f"{len(prompt_ids)} tokens",
                expected=f"fewer than its {self._positions} positions",
                fix="begin another one with /reset",
            )
        name = f"turn {len(turns)}"
        row = {"pair_id": name, "prompt_ids": prompt_ids, "temperature": self._temperature, "index": 0}
        said = self._sampler(pa.Table.from_pylist([row], schema=PROMPTS_SCHEMA)).to_pylist()[0]
        self.history = (*turns, Message("assistant", said["answer"]))
        return Said(said["answer"], said["truncated"])

    def _read(self, turns: Sequence[Message]) -> tuple[Ids, int]:
        """The ids of a prompt exactly as a training has it, and the token that ends the answers to it.

        Training reads prompts with two answers behind them, so two are made up.
        """
        chosen, rejected = (Message("assistant", text) for text in ("a", "b"))
        found = self._reader.encode(PreferencePair(tuple(turns), chosen, rejected, group=""))
        if isinstance(found, Rejection):
            raise UserError(f"The model cannot read this conversation: {found.reason}: {found.detail}", fix="/reset")
        return found.tokens.prompt_ids, int(found.tokens.chosen_ids[-1])
