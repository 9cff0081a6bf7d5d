"""A prompt, two answers and what is known about them to one pair; all rules that any pair must obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.messages import check_answer, check_prompt, read_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.values import (
    Columns,
    canonical,
    is_blank,
    is_empty,
    is_list,
    look_up,
    missing,
    number,
    optional_number,
    structure,
    text,
    there_are,
    wrong_type,
)
from dpo_train.data.pairs import Message, PreferencePair


@dataclass(frozen=True, slots=True)
class Shared:
    """What all candidate pairs of one record have in common. ``strength`` is the one that ``fields`` names."""

    prompt: tuple[Message, ...]
    group: str
    tools: str
    origin: str
    strength: float | None
    agreement: float | None
    record: Mapping[Any, Any]


def share(columns: Columns, source: SourceConfig, prompt: tuple[Message, ...], origin: tuple[str, ...] = ()) -> Shared:
    """Checks the prompt and reads the fields that every format may have.

    Args:
        prompt: its turns; a ``system`` column is put before them.
        origin: columns of this format that say where the record comes from.
    """
    prompt = _with_system(columns, prompt)
    check_prompt(prompt)
    agreement = optional_number(columns.find("agreement"), columns.name("agreement"))
    if agreement is not None and not 0 <= agreement <= 1:
        raise RejectedError("wrong_type", f"{columns.name('agreement')} is {agreement:g}, expected a share from 0 to 1")
    return Shared(
        prompt=prompt,
        group=_group(columns, source, prompt),
        tools=_tools(columns.find("tools")),
        origin=_origin(columns, origin),
        strength=optional_number(columns.find("strength"), columns.name("strength")),
        agreement=agreement,
        record=columns.record,
    )


def make_pair(
    shared: Shared,
    chosen: Message,
    rejected: Message,
    source: SourceConfig,
    *,
    strength: float | None = None,
    agreement: float | None = None,
) -> PreferencePair:
    """One pair.

    Args:
        strength: how much better ``chosen`` is by the format's own fields; a ``strength`` in ``fields`` replaces it.
        agreement: the same of the annotators.

    Raises:
        RejectedError: a rule is broken.
    """
    check_answer(chosen, "chosen")
    check_answer(rejected, "rejected")
    if chosen == rejected:
        raise RejectedError("identical_answers")
    strength = strength if shared.strength is None else shared.strength
    if strength is not None and strength < 0:
        raise RejectedError("chosen_scored_lower", f"by {-strength:g}")
    if source.min_strength > 0:
        if strength is None:
            why = "strength is unknown: name its column in fields: {strength: ...}"
            raise RejectedError("missing_field", f"{why}; {there_are(shared.record)}")
        if strength < source.min_strength:
            raise RejectedError("below_min_strength", f"{strength:g}, at least {source.min_strength:g}")
    pair = PreferencePair(
        prompt=shared.prompt,
        chosen=chosen,
        rejected=rejected,
        group=shared.group,
        tools=shared.tools,
        strength=strength,
        agreement=agreement if shared.agreement is None else shared.agreement,
        origin=shared.origin,
    )
    turns = (*pair.prompt, pair.chosen, pair.rejected)
    check_encodable(pair.group, pair.tools, pair.origin, *(part for t in turns for part in (t.content, t.extra)))
    return pair


def answer_of(value: Any, name: str) -> Message:
    """An answer that is text or the assistant's one message."""
    if isinstance(value, str):
        return Message("assistant", value)
    turns = read_turns(value, name)
    if turns and turns[-1].role != "assistant":
        raise RejectedError("last_turn_not_assistant", f"{name} ends with the {turns[-1].role}'s turn")
    if len(turns) != 1:
        raise RejectedError("roles_out_of_order", f"{name} is not exactly one assistant turn")
    return turns[0]


def _with_system(columns: Columns, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    value = columns.find("system")
    if value is None or (isinstance(value, str) and is_blank(value)):
        return prompt
    system = Message("system", text(value, columns.name("system")))
    if prompt and prompt[0].role == "system":
        if prompt[0].content == system.content:
            return prompt
        raise RejectedError("roles_out_of_order", "the system column and the prompt's system turn are different")
    return (system, *prompt)


def _group(columns: Columns, source: SourceConfig, prompt: tuple[Message, ...]) -> str:
    if source.group_key is None and "group" not in columns.mapped:
        return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
    name = source.group_key if source.group_key is not None else columns.mapped["group"]
    value = look_up(columns.record, name)
    if is_empty(value):
        raise missing(Columns(columns.record, {}), name)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise wrong_type(name, value, "text or a number")
    found = number(value, name)
    # Parquet makes floats of integers where a row is null; the group must not change with that.
    return str(int(found)) if found.is_integer() and abs(found) < 2**53 else str(value)


def _tools(value: Any) -> str:
    if is_empty(value):
        return ""
    found = structure(value, "tools")
    if not is_list(found):
        raise wrong_type("tools", found, "a list")
    return canonical(found, "tools") if found else ""


def _origin(columns: Columns, names: tuple[str, ...]) -> str:
    is_mapped = "origin" in columns.mapped
    values = [columns.find("origin")] if is_mapped else map(columns.record.get, names)
    value: Any = next((value for value in values if not is_empty(value)), "")
    if isinstance(value, str):
        return value
    if is_list(value) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    if is_mapped:
        raise wrong_type(columns.mapped["origin"], value, "text or a list of texts")
    # A column of that name which means something else.
    return ""


def check_encodable(*texts: str) -> None:
    """Arrow holds UTF-8, so a lone surrogate ends here. NUL stays: UTF-8, Arrow and tokenizers all hold it.

    Raises:
        RejectedError: a text has one.
    """
    try:
        for part in texts:
            part.encode()
    except UnicodeEncodeError:
        raise RejectedError("undecodable", "a lone surrogate, which UTF-8 cannot hold") from None
