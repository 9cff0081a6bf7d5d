"""A raw record becomes a pair or a rejection with its reason."""

from __future__ import annotations

from typing import Any

from dpo_train.data.pairs import Message, PreferencePair, Rejection

ROLES = ("system", "user", "assistant", "tool")


def validate(record: Any, group_key: str | None = None) -> PreferencePair | Rejection:
    """Reads one record.

    ``prompt`` is text (one user turn) or a list of {role, content}; ``chosen`` and ``rejected`` are text or a list with
    the one assistant turn.
    """
    if isinstance(record, Rejection):
        return record
    if not isinstance(record, dict):
        return Rejection("not_an_object", f"got {type(record).__name__}")
    needed = ["prompt", "chosen", "rejected", *([group_key] if group_key else [])]
    missing = [name for name in needed if record.get(name) is None]
    if missing:
        # A field's name may hold what UTF-8 cannot.
        names = ", ".join(map(str, record))[:100].encode(errors="backslashreplace").decode()
        return Rejection("missing_field", f"no {', '.join(missing)}; the record has {names}")
    prompt = _prompt(record["prompt"])
    if isinstance(prompt, Rejection):
        return prompt
    answers = [_answer(record[name], name) for name in ("chosen", "rejected")]
    for answer in answers:
        if isinstance(answer, Rejection):
            return answer
    chosen, rejected = map(str, answers)
    if chosen == rejected:
        return Rejection("identical_answers")
    group = str(record[group_key]) if group_key else "\n".join(f"{m.role}: {m.content}" for m in prompt)
    pair = PreferencePair(prompt, chosen, rejected, group)
    return pair if _encodable(pair) else Rejection("undecodable", "a lone surrogate, which UTF-8 cannot hold")


def _prompt(value: Any) -> tuple[Message, ...] | Rejection:
    if isinstance(value, str):
        return (Message("user", value),) if value.strip() else Rejection("empty_prompt")
    messages = _messages(value, "prompt")
    if isinstance(messages, Rejection):
        return messages
    if not messages:
        return Rejection("empty_prompt")
    if messages[-1].role == "assistant":
        return Rejection("roles_out_of_order", "the prompt's last turn is the assistant's")
    return messages


def _answer(value: Any, name: str) -> str | Rejection:
    if not isinstance(value, str):
        messages = _messages(value, name)
        if isinstance(messages, Rejection):
            return messages
        if len(messages) != 1 or messages[0].role != "assistant":
            return Rejection("roles_out_of_order", f"{name} is not exactly one assistant turn")
        value = messages[0].content
    return value if value.strip() else Rejection("empty_answer", name)


def _messages(value: Any, name: str) -> tuple[Message, ...] | Rejection:
    if not isinstance(value, list):
        return Rejection("wrong_type", f"{name} is {type(value).__name__}, expected text or a list of messages")
    messages = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str) or item.get("role") not in ROLES:
            return Rejection("wrong_type", f"a message of {name} needs a role ({', '.join(ROLES)}) and text content")
        messages.append(Message(item["role"], item["content"]))
    return tuple(messages)


def _encodable(pair: PreferencePair) -> bool:
    try:
        for text in (pair.chosen, pair.rejected, pair.group, *(m.content for m in pair.prompt)):
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
