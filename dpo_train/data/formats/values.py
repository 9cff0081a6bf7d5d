"""Values of a raw record: found by name or path, and read as what a format says they are.

Whatever cannot be read ends in a RejectedError; no value, however strange, raises anything else.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from dpo_train.data.formats.reasons import RejectedError

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
# Categories without a visible character: controls, formats (zero-width, BOM, direction marks), spaces and separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
# Drawn as nothing although Unicode calls them letters, marks or symbols: Hangul fillers, variation selectors, the
# combining grapheme joiner, the blank Braille pattern.
_INVISIBLE_LETTERS = frozenset("\u115f\u1160\u3164\uffa0\ufe0e\ufe0f\u034f\u2800")


@dataclass(frozen=True, slots=True)
class Columns:
    """A record's fields under the names that a format asks for; ``mapped`` is the source's ``fields``."""

    record: Mapping[Any, Any]
    mapped: Mapping[str, str]

    def find(self, target: str, *others: str) -> Any:
        """The value of the mapped column, else of the first of these names that holds one; None without."""
        if target in self.mapped:
            return look_up(self.record, self.mapped[target])
        for name in (target, *others):
            value = self.record.get(name)
            if value is not None:
                return value
        return None

    def need(self, target: str, *others: str) -> Any:
        """The same, but an absent or null value is a rejection."""
        value = self.find(target, *others)
        if value is None:
            raise missing(self, target)
        return value

    def name(self, target: str, *others: str) -> str:
        """The column that ``find`` reads, for messages."""
        if target in self.mapped:
            return self.mapped[target]
        return next((name for name in (target, *others) if self.record.get(name) is not None), target)


def missing(columns: Columns, *targets: str) -> RejectedError:
    """Says which fields are missing, which could be meant, and which there are."""
    wanted = [columns.mapped.get(target, target) for target in targets]
    why = f"no value for {', '.join(wanted)}{meant(columns.record, *wanted)}"
    return RejectedError("missing_field", f"{why}; {there_are(columns.record)}")


def there_are(record: Mapping[Any, Any]) -> str:
    """The fields of a record, for messages."""
    return f"the record has the fields {names_of(record)}" if record else "the record has no field"


def meant(record: Mapping[Any, Any], *wanted: str) -> str:
    """A question after the columns whose names are almost these; empty without one."""
    names = [name for name in record if isinstance(name, str)]
    found = [name for target in wanted if target not in record and (name := near(target, names))]
    return f"; did you mean {' and '.join(name[:40] for name in found)}?" if found else ""


def near(target: str, names: Iterable[str]) -> str | None:
    """The one of these names that is the target in another case or with a slip; None without."""
    plain = {name.strip().casefold(): name for name in names if len(name) <= 100}
    # response_1 and response_2 are alike, and no slip.
    plain = {key: name for key, name in plain.items() if key == target.casefold() or key[:-1] != target[:-1].casefold()}
    found = difflib.get_close_matches(target.casefold(), plain, n=1, cutoff=0.8)
    return plain[found[0]] if found else None


def names_of(record: Mapping[Any, Any]) -> str:
    """The record's field names, for messages."""
    # A repr of a huge number raises; a name is text in every file format.
    return ", ".join(name if isinstance(name, str) else kind(name) for name in record)[:150]


def look_up(record: Mapping[Any, Any], path: str) -> Any:
    """The value at a dotted path; a column whose name has that dot in it wins. None where there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def number(value: Any, name: str) -> float:
    """A finite number, also one written as text (CSV has nothing else). A boolean is none."""
    if is_empty(value):
        raise RejectedError("missing_field", f"no value for {name}")
    if isinstance(value, str) and len(value) <= 100 and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, str):
        raise RejectedError("wrong_type", f"{name} is the text {value[:40]!r}, expected a number")
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise wrong_type(name, value, "a number")
    try:
        found = float(value)
    except (OverflowError, ValueError):
        found = math.inf
    if not math.isfinite(found):
        raise RejectedError("wrong_type", f"{name} is no finite number")
    return found


def optional_number(value: Any, name: str) -> float | None:
    """The same, but null and what stands for it are None."""
    return None if is_empty(value) else number(value, name)


def text(value: Any, name: str) -> str:
    """A text, as it is."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    return value


def structure(value: Any, name: str) -> Any:
    """A list or object, also one written as JSON text: a field that cannot be text is stored so in CSV."""
    if value == "":
        raise RejectedError("missing_field", f"no value for {name}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RejectedError("wrong_type", f"{name} is text that is no JSON") from None
    if is_list(value) or isinstance(value, Mapping):
        return value
    raise wrong_type(name, value, "a list or an object")


def items(value: Any, name: str) -> Sequence[Any]:
    """A list, also one written as JSON text."""
    found = structure(value, name)
    if not is_list(found):
        raise wrong_type(name, found, "a list")
    return found  # type: ignore[no-any-return] # is_list has looked


def is_empty(value: Any) -> bool:
    """Whether the value is null, or what stands for it: empty text (CSV), an empty list (Arrow)."""
    return value is None or (isinstance(value, (str, list, tuple)) and not value)


def is_list(value: Any) -> bool:
    """Whether the value is a list: JSON's, or a tuple."""
    return isinstance(value, (list, tuple))


def wrong_type(name: str, value: Any, expected: str) -> RejectedError:
    """Says what was found in the place of what."""
    return RejectedError("wrong_type", f"{name} is {kind(value)}, expected {expected}")


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    ((int, float, Decimal), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (Mapping, "an object"),
    (bytes, "binary data"),
    ((date, time, timedelta), "a date or a time"),
)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    return next((words for types, words in _KINDS if isinstance(value, types)), type(value).__name__)


def is_blank(value: str) -> bool:
    """Whether a text has no visible character."""
    # The first character of almost every text decides.
    return all(unicodedata.category(c) in _INVISIBLE or c in _INVISIBLE_LETTERS for c in value)


def canonical(value: Any, name: str) -> str:
    """JSON without nulls, which Arrow adds where another row has a key.

    Keys keep their order: a chat template prints them, and a prompt in training must read as it does in use.
    """
    try:
        return json.dumps(_without_nulls(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        # Dates, bytes, NaN, cycles, and nesting beyond Python's limit.
        raise RejectedError("wrong_type", f"{name} holds a value that JSON does not have") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if is_list(value) else value
