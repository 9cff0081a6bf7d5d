"""The formats that say themselves which answer is chosen: prompt, chosen, rejected; pairs of transcripts."""

from __future__ import annotations

from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.assemble import make_pair, share
from dpo_train.data.formats.messages import is_python_list, read_turns, spelled_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.transcripts import hh_answers
from dpo_train.data.formats.values import (
    Columns,
    is_blank,
    is_empty,
    meant,
    missing,
    number,
    optional_number,
    there_are,
)
from dpo_train.data.pairs import Message, PreferencePair, Rejection

Turns = tuple[Message, ...]

ORIGINS = ("source", "dataset", "domain")
PROMPTS = ("instruction", "question", "input", "conversations")
"""Other names of the prompt, each taken only where it is the only one."""
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)


def read_pairs(columns: Columns, source: SourceConfig) -> list[PreferencePair | Rejection]:
    """The format `pairs`: one record, one pair."""
    if absent := [name for name in ("chosen", "rejected") if columns.find(name) is None]:
        raise missing(columns, *(["prompt"] if _prompt(columns) is None else []), *absent)
    chosen, rejected = _answers(columns)
    prompt, better, worse = _apart(_prompt(columns), chosen, rejected, columns)
    shared = share(columns, source, prompt, ORIGINS)
    return [make_pair(shared, better, worse, source, strength=_strength(columns))]


def read_hh(columns: Columns, source: SourceConfig) -> list[PreferencePair | Rejection]:
    """The format `hh`: one record, one pair."""
    if absent := [name for name in ("chosen", "rejected") if columns.find(name) is None]:
        raise missing(columns, *absent)
    prompt, better, worse = hh_answers(columns.find("prompt"), columns.find("chosen"), columns.find("rejected"))
    return [make_pair(share(columns, source, prompt, ORIGINS), better, worse, source, strength=_strength(columns))]


def _prompt(columns: Columns) -> Any:
    value = columns.find("prompt")
    if value is not None or "prompt" in columns.mapped:
        return value
    others = [name for name in PROMPTS if not is_empty(columns.record.get(name))]
    if len(others) > 1:
        why = f"no prompt, and {' and '.join(others)} could each be it: name it in fields"
        raise RejectedError("missing_field", f"{why}; {there_are(columns.record)}")
    return columns.record[others[0]] if others else None


def _answers(columns: Columns) -> tuple[Any, Any]:
    """Both answers; conversations written as JSON text only where both are, else it may be an answer about JSON."""
    chosen, rejected = columns.find("chosen"), columns.find("rejected")
    spelled = spelled_turns(chosen), spelled_turns(rejected)
    if None not in spelled:
        return spelled
    if is_python_list(chosen) and is_python_list(rejected):
        raise RejectedError("wrong_type", "chosen and rejected are messages as Python prints them, expected JSON")
    return chosen, rejected


def _apart(prompt: Any, chosen: Any, rejected: Any, columns: Columns) -> tuple[Turns, Message, Message]:
    """Prompt and answers, of conversations that repeat the prompt or hold it alone too."""
    names = columns.name("chosen"), columns.name("rejected")
    is_text = isinstance(chosen, str) or isinstance(rejected, str)
    if prompt is not None and is_empty(prompt):
        if is_text:
            raise RejectedError("empty_prompt")
        prompt = None
    if prompt is None and is_text:
        why = "no prompt, and texts without turns cannot be told from theirs: name its column in fields"
        raise RejectedError("missing_field", f"{why}{meant(columns.record, 'prompt')}; {there_are(columns.record)}")
    leads, answers = [], []
    for name, value in zip(names, (chosen, rejected), strict=True):
        *lead, answer = (Message("assistant", value),) if isinstance(value, str) else _conversation(value, name)
        leads.append(tuple(lead))
        answers.append(answer)
    better, worse = answers
    if prompt is None:
        if leads[0] != leads[1]:
            raise RejectedError("prompt_differs", f"{names[0]} and {names[1]} part before their last turn")
        if not leads[0]:
            why = "no prompt, and the conversations hold the answer alone"
            raise RejectedError("missing_field", f"{why}{meant(columns.record, 'prompt')}; {there_are(columns.record)}")
        return leads[0], better, worse
    return _whole_prompt(prompt, leads, names, columns), better, worse


def _conversation(value: Any, name: str) -> Turns:
    turns = read_turns(value, name)
    if not turns:
        raise RejectedError("empty_answer", f"{name} has no turn")
    if turns[-1].role != "assistant":
        raise RejectedError("last_turn_not_assistant", f"{name} ends with the {turns[-1].role}'s turn")
    return turns


def _whole_prompt(prompt: Any, leads: list[Turns], names: tuple[str, str], columns: Columns) -> Turns:
    """The prompt, or what the conversations tell of it beyond: a system turn, earlier turns."""
    if isinstance(prompt, str) and is_blank(prompt):
        raise RejectedError("empty_prompt")
    spelled = spelled_turns(prompt)
    is_text = isinstance(prompt, str) and spelled is None
    turns = (Message("user", prompt),) if is_text else read_turns(spelled or prompt, columns.name("prompt", *PROMPTS))
    wholes = set()
    for lead, name in zip(leads, names, strict=True):
        if not lead:
            continue
        if lead in (turns, _said(turns)):
            wholes.add(turns)
        elif _said(lead) == turns or (is_text and _asks(lead, prompt)):
            wholes.add(lead)
        elif lead[0].role == "assistant" or lead[: len(turns)] == turns:
            raise RejectedError("roles_out_of_order", f"{name} is more than one turn after the prompt")
        else:
            raise RejectedError("prompt_differs", f"{name} does not begin with the prompt")
    if len(wholes) > 1:
        raise RejectedError("prompt_differs", f"{names[0]} and {names[1]} part before their last turn")
    return wholes.pop() if wholes else turns


def _said(turns: Turns) -> Turns:
    """The turns without the system's."""
    return turns[1:] if turns and turns[0].role == "system" else turns


def _asks(lead: Turns, prompt: str) -> bool:
    """Whether the text is the first or the last user turn, which is what data sets put into their prompt column."""
    asked = [turn.content.strip() for turn in lead if turn.role == "user"]
    return bool(asked) and prompt.strip() in (asked[0], asked[-1])


def _strength(columns: Columns) -> float | None:
    """The difference of the two scores, or the margin; None where the data has neither."""
    if not is_empty(columns.find("strength")):
        return None  # `share` has read it
    for better, worse in SCORES:
        values = columns.find(better), columns.find(worse)
        if not any(map(is_empty, values)):
            return number(values[0], columns.name(better)) - number(values[1], columns.name(worse))
    return optional_number(columns.find("margin"), columns.name("margin"))
