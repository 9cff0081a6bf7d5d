"""Texts made from the config's dataclasses: ``dpo init``'s file and docs/config.md."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from dpo_train.config import RunConfig
from dpo_train.decoding import kind_of, section_types

_HEAD = """\
# Config of dpo. A line such as "#beta: 0.1" shows a default: remove its "#" to change it.
# Any key can also be given on the command line: dpo run {name} train.beta=0.2
"""

_REQUIRED = {"model.path": "./my-model", "prepare.path": "./my-pairs.jsonl"}

_EXAMPLES = {
    "function": "my_rewards:helpful",
    "path": "./my-reward-model",
    "url": "https://judge.example/v1",
    "model": "my-judge",
}
"""Values of required keys in sections that are shown on one line."""


def commented_config() -> str:
    """A YAML config in which every key stands with its help; only what is required is not a comment."""
    lines = [_HEAD.format(name="my.yaml")]
    lines += _section(RunConfig, "", 0)
    return "\n".join(lines) + "\n"


def reference() -> str:
    """docs/config.md: a table per section."""
    blocks = [
        "# Config reference",
        "Generated from the dataclasses in `dpo_train/config/` by `make docs`; do not edit.",
        "Every key may be set in the YAML file or on the command line as `section.key=value`.",
    ]
    blocks += _tables(RunConfig, "")
    return "\n\n".join(blocks) + "\n"


def _sections(hint: Any) -> tuple[type, ...]:
    """The sections behind a field, unless it may be a list as well, which is shown as one value."""
    return () if any(typing.get_origin(part) is tuple for part in typing.get_args(hint)) else section_types(hint)


def _section(kind: type, prefix: str, depth: int) -> list[str]:
    hints = typing.get_type_hints(kind)
    lines = []
    for item in dataclasses.fields(kind):
        key = prefix + item.name
        sections = _sections(hints[item.name])
        indent = "  " * depth
        if sections:
            lines += ["", f"{indent}# {item.metadata['help']}"]
        for inner in sections:
            if len(sections) > 1:
                lines.append(f"{indent}# {kind_of(inner)}: {_about(inner)}")
            if item.default is None:  # an optional section: naming it switches it on
                lines.append(f"{indent}#{item.name}: {_inline(inner)}")
            else:
                lines += [f"{indent}{item.name}:", *_section(inner, f"{key}.", depth + 1)]
        if sections:
            continue
        lines.append(f"{indent}# {item.metadata['help']}")
        if key in _REQUIRED:
            lines.append(f"{indent}{item.name}: {_REQUIRED[key]}")
        else:
            lines.append(f"{indent}#{item.name}: {_text(item)}")
    return lines


def _inline(kind: type) -> str:
    """A section's defaults on one line, with examples for what is required."""
    shown = []
    for item in dataclasses.fields(kind):
        required = "" if _has_default(item) else kind_of(kind) if item.name == "kind" else _EXAMPLES[item.name]
        value = required or _text(item)
        shown.append(f"{item.name}: {value}")
    return "{" + ", ".join(shown) + "}"


def _about(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _tables(kind: type, prefix: str, name: str = "") -> list[str]:
    """The section's table and those of its sections; ``name`` tells alternatives apart."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rows, inner_blocks = ["| key | type | default | meaning |", "|---|---|---|---|"], []
    for item in dataclasses.fields(kind):
        sections = _sections(typing.get_type_hints(kind)[item.name])
        for inner in sections:
            alternative = f" (kind: {kind_of(inner)})" if len(sections) > 1 else ""
            inner_blocks += _tables(inner, f"{prefix}{item.name}.", alternative)
        if sections:
            continue
        default = f"`{_text(item)}`" if _has_default(item) else "required"
        shown, help_text = _cell(_type_text(hints[item.name])), _cell(item.metadata["help"]).replace("<", "&lt;")
        rows.append(f"| `{prefix}{item.name}` | {shown} | {default} | {help_text} |")
    title = f"## {prefix.rstrip('.')}{name}" if prefix else "## Top level"
    return [title, _about(kind), "\n".join(rows), *inner_blocks]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type_text(hint: Any) -> str:
    """A type as people read it: ``int >= 1``, ``one of sigmoid, hinge``."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [str(limit) for limit in parameters[1:] if type(limit).__name__ in {"Ge", "Gt", "Le", "Lt"}]
        names = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
        shown = [f"{sign} {text[text.index('=') + 1 : -1]}" for text in limits for name, sign in names.items()
                 if text.startswith(f"{name}(")]  # fmt: skip
        return " ".join([_type_text(parameters[0]), " and ".join(shown)]).strip()
    if origin is typing.Literal:
        return ("one of " if len(parameters) > 1 else "") + ", ".join(map(str, parameters))
    if dataclasses.is_dataclass(hint):
        return "mappings with keys of its section"
    if hint in {JsonValue, Any}:
        return "any value"
    if origin in {dict, Mapping} and typing.get_origin(parameters[0]) is not typing.Literal:
        return f"mapping of names to {_type_text(parameters[1])}"
    if origin is dict:
        return f"mapping of any of these to {_type_text(parameters[1])}"
    if origin is tuple:
        return f"list of {_type_text(parameters[0])}"
    if parameters:
        return " | ".join(_alternative(part) for part in parameters)
    return str(getattr(hint, "__name__", hint))


def _alternative(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return (
        "{" + ", ".join(f.name for f in dataclasses.fields(hint)) + "}"
        if dataclasses.is_dataclass(hint)
        else _type_text(hint)
    )


def _has_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def _text(item: dataclasses.Field[Any]) -> str:
    """The default, as YAML takes it."""
    if item.default_factory is not dataclasses.MISSING:
        return json.dumps(item.default_factory())
    return item.default if isinstance(item.default, str) else json.dumps(item.default)
