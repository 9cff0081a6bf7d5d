"""Pairs to token ids: one canonical tokenisation of prompt and answer.

Prompt and answer are tokenised apart, so that no token spans their border and training sees the ids that generation
sees. The answer ends with the end-of-turn token, except where it was cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpo_train.data.pairs import Message, PreferencePair, Rejection, TokenPair
from dpo_train.errors import ModelError, first_line


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token", expected="eos_token to be set")
    return tokenizer


class PairTokenizer:
    """Tokenises pairs.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: "chat" for its chat template, "plain" for bare text.
        max_prompt_tokens: a longer prompt is rejected.
        max_answer_tokens: a longer answer is cut at its end.

    Raises:
        ModelError: "chat" is asked for and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, template: str, max_prompt_tokens: int, max_answer_tokens: int) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise ModelError(
                "The tokenizer has no chat template", fix="set prepare.template=plain, or use a chat model"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._max_prompt = max_prompt_tokens
        self._max_answer = max_answer_tokens

    def encode(self, pair: PreferencePair) -> tuple[TokenPair, int] | Rejection:
        """Token ids and the number of answers that were cut (0 to 2), or why the pair cannot be used."""
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if self._tokenizer.eos_token in answer:
                return Rejection("end_token_in_answer", f"{name} spells {self._tokenizer.eos_token}")
        try:
            prompt, chosen, rejected = self._texts(pair)
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            return Rejection("template_refused", str(error)[:200])
        prompt_ids = self.prompt_ids_of(prompt)
        if not prompt_ids:
            return Rejection("empty_prompt", "no token left")
        if len(prompt_ids) > self._max_prompt:
            return Rejection("prompt_too_long", f"{len(prompt_ids)} tokens, at most {self._max_prompt}")
        chosen_ids, chosen_cut = self._answer_ids(chosen)
        rejected_ids, rejected_cut = self._answer_ids(rejected)
        if chosen_ids == rejected_ids:
            return Rejection("identical_after_truncation")
        prompt_array, chosen_array, rejected_array = (
            np.array(ids, dtype=np.int32) for ids in (prompt_ids, chosen_ids, rejected_ids)
        )
        return TokenPair(pair.pair_id, prompt_array, chosen_array, rejected_array), chosen_cut + rejected_cut

    def prompt_ids_of(self, text: str) -> list[int]:
        """Ids of a templated prompt. A plain prompt gets the one BOS that its tokenizer asks for."""
        special = self._template == "plain"
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        # Some tokenizers close every text with EOS; a prompt goes on.
        return ids[:-1] if special and ids and ids[-1] == self._tokenizer.eos_token_id else ids

    def _texts(self, pair: PreferencePair) -> tuple[str, str, str]:
        if self._template == "plain":
            return "".join(m.content for m in pair.prompt), pair.chosen, pair.rejected
        prompt = self._render(pair.prompt, add_generation_prompt=True)
        answers = []
        for answer in (pair.chosen, pair.rejected):
            whole = self._render((*pair.prompt, Message("assistant", answer)), add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise ValueError("the chat template changes the prompt once an answer follows")
            answers.append(whole[len(prompt) :])
        return prompt, *answers  # type: ignore[return-value]

    def _render(self, messages: tuple[Message, ...], *, add_generation_prompt: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _answer_ids(self, text: str) -> tuple[list[int], bool]:
        eos = self._tokenizer.eos_token_id
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        # What a template writes after the end of the turn is never generated.
        ids = ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else [*ids, eos]
        return (ids[: self._max_answer], True) if len(ids) > self._max_answer else (ids, False)
