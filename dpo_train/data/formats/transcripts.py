"""Conversations written as one text: Anthropic's Human/Assistant transcripts, and HelpSteer2's turn marks."""

from __future__ import annotations

import re
from typing import Any

from dpo_train.data.formats.assemble import answer_of
from dpo_train.data.formats.messages import read_turns, spelled_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.values import wrong_type
from dpo_train.data.pairs import Message

# A turn begins after an empty line; the one blank after the colon belongs to the mark.
_MARK = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):(?: |(?=\n)|$)")
_HELPSTEER_MARK = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether a text begins as a transcript of Human and Assistant does."""
    return isinstance(value, str) and value[:40].lstrip().startswith("Human:") and _MARK.match(value) is not None


def is_open_transcript(value: Any) -> bool:
    """Whether a transcript ends where the assistant is to speak, as a prompt does."""
    return is_transcript(value) and value.rstrip().endswith("\n\nAssistant:")


def transcript_turns(value: str, name: str) -> tuple[Message, ...]:
    """The turns of a transcript; an answer's white space stays, an open last turn is an empty one."""
    if not is_transcript(value):
        raise RejectedError("wrong_type", f"{name} does not begin with a Human: turn")
    return _cut(_MARK, value)


def marked_turns(value: str) -> tuple[Message, ...]:
    """HelpSteer2's prompt: the first user turn, then turns behind <extra_id_1>User or <extra_id_1>Assistant."""
    mark = _HELPSTEER_MARK.search(value)
    if mark is None:
        return (Message("user", value),)
    first = (Message("user", value[: mark.start()]),) if mark.start() else ()
    return (*first, *_cut(_HELPSTEER_MARK, value))


def prompt_turns(value: Any, name: str) -> tuple[Message, ...]:
    """A prompt that is text, an open transcript, or messages (also as JSON text)."""
    if isinstance(value, str):
        if is_open_transcript(value):
            return transcript_turns(value.rstrip(), name)[:-1]
        value = spelled_turns(value) or value
    return (Message("user", value),) if isinstance(value, str) else read_turns(value, name)


def hh_answers(prompt: Any, chosen: Any, rejected: Any) -> tuple[tuple[Message, ...], Message, Message]:
    """Prompt and answers of two transcripts that differ in their last turn, or of a transcript with two answers."""
    if prompt is not None:
        if not is_open_transcript(prompt):
            raise RejectedError("wrong_type", "prompt is no transcript that ends with Assistant:")
        if is_transcript(chosen) and is_transcript(rejected):
            found = hh_answers(None, chosen, rejected)
            if found[0] != prompt_turns(prompt, "prompt"):
                raise RejectedError("prompt_differs", "the transcripts do not begin with the prompt")
            return found
        return prompt_turns(prompt, "prompt"), answer_of(chosen, "chosen"), answer_of(rejected, "rejected")
    both = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            raise wrong_type(name, value, "a transcript")
        turns = transcript_turns(value, name)
        if turns[-1].role != "assistant":
            raise RejectedError("last_turn_not_assistant", f"{name} ends with a Human: turn")
        both.append(turns)
    (*lead, better), (*other, worse) = both
    if lead != other:
        raise RejectedError("prompt_differs", "the transcripts part before their last turn")
    return tuple(lead), better, worse


def _cut(mark: re.Pattern[str], value: str) -> tuple[Message, ...]:
    found = list(mark.finditer(value))
    ends = [*(m.start() for m in found[1:]), len(value)]
    return tuple(Message(_ROLES[m[1]], value[m.end() : end]) for m, end in zip(found, ends, strict=True))
