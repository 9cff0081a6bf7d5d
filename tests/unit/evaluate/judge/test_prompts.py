"""The judge's prompts and the reading of its replies."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.config.judging import DEFAULT_PROMPTS
from dpo_train.errors import ConfigError
from dpo_train.evaluate.judge import prompts


@pytest.mark.parametrize("name", DEFAULT_PROMPTS)
def test_default_prompt_asks_for_a_reply_that_is_understood(name: str) -> None:
    """The forms that it offers are read as what they say."""
    text = prompts.load(name)
    offered = [line for line in text.splitlines() if line.startswith("Preferred:")]
    assert [prompts.parse(line) for line in offered] == ["first", "second", "tie"]


@pytest.mark.parametrize(
    ("reply", "decision"),
    [
        ("Preferred: A", "first"),
        ("A says more.\nPreferred: B\n\n", "second"),
        ("**Preferred: tie**", "tie"),
        ("preferred: `b`.", "second"),
        ("Preferred: A\nPreferred: B", "second"),
        ("I think\r\nPreferred: A\r\n", "first"),
        ("Preferred: A or B", None),
        ("Preferred: AB", None),
        ("Preferred: Answer A", None),
        ("Preferred:", None),
        ("Not preferred: A", None),
        ("Preferred: A\nBut B is nice too.", None),
        ("A", None),
        ("", None),
    ],
)
def test_only_the_last_line_decides(reply: str, decision: str | None) -> None:
    """A decision is a whole line in one of the three forms; emphasis around it does no harm."""
    assert prompts.parse(reply) == decision


def test_file_of_the_user_is_filled_in(tmp_path: Path) -> None:
    """Each place any number of times; other braces, and braces in the texts, stay as they are."""
    file = tmp_path / "mine.txt"
    file.write_text('{"task": 1}\n{prompt}\n{a}\n{b}\n{a}\nPreferred: A, B or tie')
    conversation = [{"role": "user", "content": "Hi {b}"}, {"role": "assistant", "content": "Ho"}]

    filled = prompts.fill(prompts.load(str(file)), conversation, "{prompt} \\1", "")

    quoted = "> user:\n> Hi {b}\n> \n> assistant:\n> Ho"
    assert filled == f'{{"task": 1}}\n{quoted}\n> {{prompt}} \\1\n>  \n> {{prompt}} \\1\nPreferred: A, B or tie'


def test_single_turn_is_shown_without_its_role() -> None:
    """A text to summarise is no conversation."""
    filled = prompts.fill("{prompt}", [{"role": "user", "content": "a text\nof two lines"}], "", "")
    assert filled == "> a text\n> of two lines"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{prompt} {a} Preferred: ", r"has no place for \{b\}"),
        ("Preferred: A", r"has no place for \{prompt\} and \{a\} and \{b\}"),
        ("{prompt} {a} {b}", "does not say how the reply must end"),
        (None, "cannot be read"),
    ],
)
def test_file_that_cannot_work_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    """Before anything is trained."""
    file = tmp_path / "mine.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        prompts.load(str(file))
