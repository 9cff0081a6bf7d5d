"""YAML text -> dict -> frozen dataclass, strictly: every mistake names its key, what was given and what to write.

parse_yaml(text)              duplicate keys are refused, 5e-7 is a number
apply_override(tree, "a.b=1") one ``section.key=value``
decode(tree, kind)            unknown keys, wrong types and values out of range are told all at once
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dpo_train.errors import ConfigError

Decoded = TypeVar("Decoded")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``5e-7`` is a number, as people mean it (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


# As YAML 1.2 and JSON have it: `on`, `off`, `yes` and `no` are words, and some options take them.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_yaml(text: str, origin: str) -> Any:
    """YAML (or JSON) as plain values.

    Raises:
        ConfigError: it is no YAML, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``section.key=value`` in the tree.

    Raises:
        ConfigError: it has no ``=``, its value is no YAML, or it goes through a single value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError("An override cannot be read", got=repr(override), expected="section.key=value")
    *sections, last = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"The override {override!r} goes through {section!r}, which is a single value")
        node = child
    node[last] = parse_yaml(text, f"the override {override!r}")


def walk_options(kind: type, prefix: str = "") -> list[tuple[str, dataclasses.Field[Any]]]:
    """(dotted key, field) for every option, sections included, in the order of declaration."""
    hints = typing.get_type_hints(kind)
    found: list[tuple[str, dataclasses.Field[Any]]] = []
    for item in dataclasses.fields(kind):
        found.append((prefix + item.name, item))
        inner = section_type(hints[item.name])
        if inner is not None:
            found.extend(walk_options(inner, f"{prefix}{item.name}."))
    return found


def section_type(hint: Any) -> type | None:
    """The dataclass behind a field's type (``X`` or ``X | None``), or None for a plain value or a list."""
    if typing.get_origin(hint) is tuple:
        return None
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _drop_empty_sections(tree: dict[str, Any], kind: type) -> None:
    """A section of which every line is a comment reads as null in YAML; it means the defaults."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        inner = section_type(hints[item.name])
        if inner is None or item.name not in tree:
            continue
        if tree[item.name] is None and item.default is not None:
            del tree[item.name]
        elif isinstance(tree[item.name], dict):
            _drop_empty_sections(tree[item.name], inner)


def decode(tree: dict[str, Any], kind: type[Decoded], origin: str) -> Decoded:
    """The dataclass that the tree describes.

    Raises:
        ConfigError: unknown or missing keys, wrong types, values out of range; all of them in one message.
    """
    _drop_empty_sections(tree, kind)
    try:
        # JSON mode keeps strictness and still lets a list be read as a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(problem, kind) for problem in _leaf_problems(error)]
        raise ConfigError(f"{origin} has {len(lines)} mistake{'s' * (len(lines) > 1)}: " + "; ".join(lines)) from None


def _leaf_problems(error: ValidationError) -> list[dict[str, Any]]:
    """One problem per key: of the branches of a union that failed, the first or the deepest says enough."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for problem in error.errors(include_url=False):
        *sections, last = problem["loc"]
        path = tuple(part for part in sections if not (isinstance(part, str) and _is_union_tag(part)))
        # An unknown key is always the last part, whatever it looks like.
        if problem["type"] == "unexpected_keyword_argument" or not (isinstance(last, str) and _is_union_tag(last)):
            path = (*path, last)
        seen.setdefault(path, {**problem, "loc": path})
    return [problem for path, problem in seen.items() if not any(p[:-1] == path for p in seen if p)]


def _is_union_tag(part: str) -> bool:
    return not part.isidentifier() or part[0].isupper() or part in {"int", "float", "str", "bool"}


def _item_type(kind: type, loc: tuple[Any, ...]) -> type | None:
    """The dataclass of the items of the list in which a problem lies."""
    for name in loc[:-2]:
        hint = typing.get_type_hints(kind).get(name)
        if typing.get_origin(hint) is tuple:
            return section_type(typing.get_args(hint)[0])
        inner = section_type(hint)
        if inner is None:
            return None
        kind = inner
    return None


def _explain(problem: dict[str, Any], kind: type) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        known = [key for key, _ in walk_options(kind)]
        if len(problem["loc"]) > 2 and isinstance(problem["loc"][-2], int):
            # In an item of a list the keys are those of the item.
            item = _item_type(kind, problem["loc"])
            known = [f"{key.rpartition('.')[0]}.{name}" for name, _ in walk_options(item)] if item else []
        near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.split(".")[-1], [k.split(".")[-1] for k in known], n=1
        )
        full = next((k for k in known if near and (k == near[0] or k.split(".")[-1] == near[0])), None)
        return f"unknown key {key!r}" + (f" (did you mean {full!r}?)" if full else "")
    if problem["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        return f"{key!r} is required"
    message = problem["msg"].removeprefix("Input ").removesuffix(".")
    return f"{key!r} {message}, got {problem['input']!r}"
