"""Turns of conversations as people write them, and the rules that their order obeys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.values import canonical, is_blank, is_empty, is_list, wrong_type
from dpo_train.data.formats.values import kind as type_of
from dpo_train.data.pairs import Message

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Role as written -> role. Only names that mean one thing wherever they are used."""

EXTRA_KEYS = (
    "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "function_call", "tool_plan",
    "citations", "documents",
)  # fmt: skip
"""Keys of a message that chat templates read. Others (time stamps, ids, ratings) would make equal turns differ."""

_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


def read_turns(value: Any, name: str) -> tuple[Message, ...]:
    """A list of messages, or one message, as turns."""
    if isinstance(value, Mapping):
        value = [value]
    if not is_list(value):
        raise wrong_type(name, value, "text or a list of messages")
    return tuple(_message(item, name) for item in value)


def spelled_turns(value: Any) -> Sequence[Any] | None:
    """A conversation or message written as JSON text, as CSV holds it; None for any other text.

    JSON counts only where each object has a role and content, so that an answer which is some JSON stays a text.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    turns = [found] if isinstance(found, dict) else found
    return turns if turns and all(isinstance(turn, dict) and _speaks(turn) for turn in turns) else None


def is_python_list(value: Any) -> bool:
    """Whether a text is a conversation printed by Python (``[{'role': ...``), which is no JSON."""
    return isinstance(value, str) and _PYTHON_LIST.match(value) is not None


def has_tool_calls(message: Message) -> bool:
    """Whether the turn calls tools."""
    return bool(message.extra) and bool(json.loads(message.extra).get("tool_calls"))


def check_answer(message: Message, name: str) -> None:
    """An answer says something, or calls a tool."""
    if is_blank(message.content) and not has_tool_calls(message):
        raise RejectedError("empty_answer", name)


def check_prompt(prompt: tuple[Message, ...]) -> None:
    """The prompt's turns stand in an order that a conversation has, and its last is to be answered.

    Two user turns in a row are allowed: people write a second message before the answer comes (Anthropic's transcripts
    have it), nothing is ambiguous about it, and a chat template that does not take it refuses by itself.
    """
    if not prompt:
        raise RejectedError("empty_prompt", "no turn")
    before: Message | None = None
    for index, turn in enumerate(prompt):
        if turn.role == "system" and index:
            raise RejectedError(
                "roles_out_of_order", f"turn {index + 1} is the system's, which stands first or nowhere"
            )
        if turn.role == "assistant" and before and before.role == "assistant":
            raise RejectedError("roles_out_of_order", f"turns {index} and {index + 1} are both the assistant's")
        if turn.role == "tool" and not (before and (before.role == "tool" or has_tool_calls(before))):
            raise RejectedError("roles_out_of_order", f"turn {index + 1} is a tool's, and no tool call comes before it")
        before = turn
    if prompt[-1].role not in ("user", "tool"):
        raise RejectedError("roles_out_of_order", f"the prompt's last turn is the {prompt[-1].role}'s")
    # A tool may well return nothing.
    if prompt[-1].role == "user" and is_blank(prompt[-1].content):
        raise RejectedError("empty_prompt", "the turn to be answered is empty")


def _speaks(message: Mapping[Any, Any]) -> bool:
    return ("role" in message and ("content" in message or "tool_calls" in message)) or (
        "from" in message and "value" in message
    )


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise wrong_type(f"a message of {name}", item, "an object with role and content")
    written = item.get("role") if item.get("role") is not None else item.get("from")
    role = ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if role is None:
        said = repr(written[:40]) if isinstance(written, str) else type_of(written)
        raise RejectedError("wrong_type", f"a message of {name} has the role {said}, expected {', '.join(ROLES)}")
    kept = {key: item[key] for key in EXTRA_KEYS if key in item and not is_empty(item[key])}
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], name)
    content = _content(item.get("content") if item.get("content") is not None else item.get("value"), name)
    if content is None:
        if "tool_calls" not in kept:
            raise RejectedError("wrong_type", f"a message of {name} has no text content and no tool call")
        content = ""
    return Message(role, content, canonical(kept, f"a message of {name}") if kept else "")


def _content(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not is_list(value):
        raise wrong_type(f"the content of a message of {name}", value, "text or a list of parts")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise wrong_type(f"a content part of {name}", part, "an object with type and text")
        kind = part.get("type") if part.get("type") is not None else "text"
        if kind != "text":
            said = kind if isinstance(kind, str) else type_of(kind)
            raise RejectedError("not_text", f"a message of {name} has a part of type {said}")
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"the text of a content part of {name}", part.get("text"), "text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: Any, name: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RejectedError("wrong_type", f"tool_calls of {name} is text that is no JSON") from None
    if not is_list(value) or not value or not all(isinstance(call, Mapping) for call in value):
        raise wrong_type(f"tool_calls of {name}", value, "a list of calls")
    return value
