"""The question put to a language model, and what may be taken for its answer.

A prompt is a text file with the places {prompt}, {a} and {b}. What is filled in comes as a quotation, each line behind
"> ", so that no text can look as if its quotation had ended, whatever it holds. Of the reply only the last line counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent

from dpo_train.config.judging import DEFAULT_PROMPTS
from dpo_train.errors import ConfigError

PLACES = ("prompt", "a", "b")
VERDICTS = {"a": "first", "b": "second", "tie": "tie"}

ASK_AGAIN = (
    "Your reply does not end in a decision. Reply with one line alone: `Preferred: A`, `Preferred: B` or "
    "`Preferred: tie`."
)

_LAST_LINE = re.compile(r"[\s*_`>#-]*preferred:[\s*_`\"']*(a|b|tie)[\s*_`\"'.]*", re.IGNORECASE)


def load(prompt: str) -> str:
    """The text of a default by its name, or of a file.

    Raises:
        ConfigError: the file cannot be read, or lacks a place or the line that the reply must end in.
    """
    path = Path(__file__).with_name(f"{prompt}.txt") if prompt in DEFAULT_PROMPTS else Path(prompt)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The judge's prompt {path} cannot be read: {error}",
            got=f"evaluate.judge.prompt={prompt}",
            expected=f"{', '.join(DEFAULT_PROMPTS)}, or a text file",
        ) from None
    if missing := [f"{{{place}}}" for place in PLACES if f"{{{place}}}" not in text]:
        raise ConfigError(
            f"The judge's prompt {path} has no place for {' and '.join(missing)}", expected="{prompt}, {a}, {b}"
        )
    if "preferred:" not in text.lower():
        raise ConfigError(
            f"The judge's prompt {path} does not say how the reply must end",
            expected="a last line of its own: `Preferred: A`, `Preferred: B` or `Preferred: tie`",
        )
    return text


def fill(text: str, prompt: Sequence[Mapping[str, str]], first: str, second: str) -> str:
    """The question about two answers. Braces in what is filled in mean nothing."""
    values = {"prompt": _conversation(prompt), "a": first, "b": second}
    return re.sub(r"\{(prompt|a|b)\}", lambda place: indent(values[place[1]] or " ", "> ", lambda _: True), text)


def parse(reply: str) -> str | None:
    """ "first", "second" or "tie", by the last line of a reply; None: it names no decision."""
    _, _, last = reply.strip().rpartition("\n")
    found = _LAST_LINE.fullmatch(last)
    return VERDICTS[found[1].lower()] if found else None


def _conversation(prompt: Sequence[Mapping[str, str]]) -> str:
    """The text of a single turn; of several turns, each under its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}:\n{message['content']}" for message in prompt)
