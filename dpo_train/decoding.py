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
        for inner in section_types(hints[item.name]):
            found.extend(walk_options(inner, f"{prefix}{item.name}."))
    return found


def section_types(hint: Any) -> tuple[type, ...]:
    """The dataclasses behind a field's type: one for ``X`` or ``X | None``, none for a plain value or a list.

    Several are alternatives; each has an option ``kind``, whose value names it.
    """
    if typing.get_origin(hint) is tuple:
        return ()
    candidates = (hint, *typing.get_args(hint))
    return tuple(found for found in candidates if isinstance(found, type) and dataclasses.is_dataclass(found))


def kind_of(section: type) -> str:
    """The value of ``kind`` that means this alternative."""
    return str(typing.get_args(typing.get_type_hints(section)["kind"])[0])


def _drop_empty_sections(tree: dict[str, Any], kind: type) -> None:
    """A section of which every line is a comment reads as null in YAML; it means the defaults."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        sections = section_types(hints[item.name])
        if not sections or item.name not in tree:
            continue
        if tree[item.name] is None and item.default is not None:
            del tree[item.name]
        elif isinstance(tree[item.name], dict):
            for inner in sections:
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
        lines = [_explain(problem, kind) for problem in _leaf_problems(error, kind)]
        raise ConfigError(f"{origin} has {len(lines)} mistake{'s' * (len(lines) > 1)}: " + "; ".join(lines)) from None


def _leaf_problems(error: ValidationError, kind: type) -> list[dict[str, Any]]:
    """One problem per key: of the branches of a union that failed, the first or the deepest says enough."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for problem in error.errors(include_url=False):
        *sections, last = problem["loc"]
        path = tuple(part for part in sections if not (isinstance(part, str) and _is_union_tag(part)))
        # An unknown key is always the last part, whatever it looks like.
        if problem["type"] == "unexpected_keyword_argument" or not (isinstance(last, str) and _is_union_tag(last)):
            path = (*path, last)
        path, owner = _follow(path, kind)
        seen.setdefault(path, {**problem, "loc": path, "owner": owner})
    return [problem for path, problem in seen.items() if not any(p[:-1] == path for p in seen if p)]


def _follow(loc: tuple[Any, ...], kind: type) -> tuple[tuple[Any, ...], type | None]:
    """The keys of a problem without the names of alternatives, which pydantic puts behind their section's.

    Returns:
        keys, and the dataclass in which the last one lies if that is one of alternatives or the item of a list.
    """
    path: list[Any] = []
    section: type | None = kind
    is_own = False
    parts = iter(loc[:-1])
    for part in parts:
        path.append(part)
        if section is None or isinstance(part, int):
            continue
        hint = typing.get_type_hints(section).get(part)
        is_list = typing.get_origin(hint) is tuple
        found = section_types(typing.get_args(hint)[0] if is_list else hint)
        is_own |= is_list or len(found) > 1
        if len(found) > 1:
            name = next(parts, None)
            found = tuple(alternative for alternative in found if kind_of(alternative) == name)
        section = found[0] if found else None
    return (*path, *loc[-1:]), section if is_own else None


def _is_union_tag(part: str) -> bool:
    return not part.isidentifier() or part[0].isupper() or part in {"int", "float", "str", "bool"}


def _explain(problem: dict[str, Any], kind: type) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        section, _, name = key.rpartition(".")
        known = [option for option, _ in walk_options(kind)]
        near: list[str] = []
        if problem["owner"] is not None:
            known = [f"{section}.{option}" for option, _ in walk_options(problem["owner"])]
        else:
            near = difflib.get_close_matches(key, known, n=1)
        near = near or difflib.get_close_matches(name, [k.split(".")[-1] for k in known], n=1)
        full = next((k for k in known if near and (k == near[0] or k.split(".")[-1] == near[0])), None)
        return f"unknown key {key!r}" + (f" (did you mean {full!r}?)" if full else "")
    if problem["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        return f"{key!r} is required"
    if problem["type"] == "union_tag_not_found":
        return f"'{key}.kind' is required: {_kinds(kind, problem['loc'])}"
    if problem["type"] == "union_tag_invalid":
        return f"'{key}.kind' should be {_kinds(kind, problem['loc'])}, got {problem['input']['kind']!r}"
    message = problem["msg"].removeprefix("Input ").removesuffix(".")
    return f"{key!r} {message}, got {problem['input']!r}"


def _kinds(kind: type, loc: tuple[Any, ...]) -> str:
    """The kinds of the section at a place, as a choice."""
    sections: tuple[type, ...] = (kind,)
    for part in loc:
        sections = section_types(typing.get_type_hints(sections[0])[part])
    *others, last = [repr(kind_of(section)) for section in sections]
    return f"{', '.join(others)} or {last}"
