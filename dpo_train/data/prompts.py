"""Files of prompts to be answered: JSON lines with ``prompt`` (text or messages), or a text file with one a line."""

from __future__ import annotations

import json

from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.transcripts import prompt_turns
from dpo_train.data.pairs import Message
from dpo_train.errors import DataError

_LINES = (".jsonl", ".ndjson")
_EXPECTED = 'an object with `prompt`: a text, or messages [{"role": "user", "content": "..."}]'


def read_prompt_lines(text: str, name: str) -> list[tuple[Message, ...]]:
    """The prompts of a file of that name; blank lines are none.

    Raises:
        DataError: a line is no prompt, or there is no prompt at all.
    """
    if not name.endswith((*_LINES, ".txt")):
        raise DataError(f"{name} is no file of prompts", expected=f"a name that ends in {', '.join(_LINES)} or .txt")
    # A text may hold other characters that `splitlines` takes for the end of a line.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"There are no prompts in {name}", got="an empty file", expected=_EXPECTED + " in each line")
    if not name.endswith(_LINES):
        return [(Message("user", line),) for _, line in lines]
    return [_prompt(line, f"{name}, line {number}") for number, line in lines]


def _prompt(line: str, where: str) -> tuple[Message, ...]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is no JSON", got=line[:80], expected=_EXPECTED) from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not prompt:
        raise DataError(f"{where} has no prompt", got=line[:80], expected=_EXPECTED)
    try:
        turns = prompt_turns(prompt, "prompt")
    except RejectedError as error:
        rejection = error.rejection
        raise DataError(
            f"{where} has no prompt", got=f"{rejection.reason}: {rejection.detail}", expected=_EXPECTED
        ) from None
    if not any(turn.content.strip() for turn in turns):
        raise DataError(f"{where} has an empty prompt", got=line[:80], expected="a prompt with text")
    return turns
