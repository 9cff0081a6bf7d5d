"""Overlap of pairs with the prompts that a model will be evaluated on.

Words are runs of letters and digits, without case; n of them in a row make an n-gram. A million n-grams are 8 MB: only
their 64-bit hashes are kept, sorted. Of a thousand million n-grams compared with a million, one is mistaken for another
with a chance of 1e9 * 1e6 / 2**64, about 5e-5.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_train.data.formats.messages import read_turns, spelled_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.pairs import PreferencePair
from dpo_train.data.sources.base import not_utf8
from dpo_train.data.sources.json_values import why_undecodable
from dpo_train.errors import DataError

Hashes = npt.NDArray[np.uint64]

_EXPECTED = '{"prompt": text or messages}'
_FIX = "mend or remove it"
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".txt")
_WORD = re.compile(r"[^\W_]+")
# Odd, so that multiplying by its powers loses no bit: the place of a word in its n-gram counts.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Overlap:
    """Finds n-grams of evaluation prompts in pairs; built once per worker.

    Args:
        prompts: the evaluation prompts. One of fewer than ``n`` words counts only as a whole: "Hello!" is no reason to
            drop every pair that greets.
        n: words in a row that count as overlap.
    """

    def __init__(self, prompts: Iterable[str], n: int) -> None:
        self._n = n
        grams, short = [], set()
        for prompt in prompts:
            words = _words(prompt)
            if len(words) < n:
                short.add(_whole(prompt, words))
            else:
                grams.append(_hash_grams(words, n))
        self._grams: Hashes = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
        self._short = frozenset(short)

    def overlaps(self, pair: PreferencePair) -> str | None:
        """The first n-gram (or the whole short prompt) that the pair's user turns share; None where there is none."""
        turns = [turn.content for turn in pair.prompt if turn.role == "user"]
        for text in turns:
            words = _words(text)
            if len(words) >= self._n:
                place = self._find(_hash_grams(words, self._n))
                if place is not None:
                    return " ".join(words[place : place + self._n])
            elif _whole(text, words) in self._short:
                return _whole(text, words)
        # An evaluation prompt of several turns is one text.
        joined = "\n".join(turns)
        whole = _whole(joined, _words(joined)) if self._short and len(turns) > 1 else None
        return whole if whole in self._short else None

    def _find(self, grams: Hashes) -> int | None:
        if not len(self._grams):
            return None
        places = np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)
        hits = np.flatnonzero(self._grams[places] == grams)
        return int(hits[0]) if len(hits) else None


def read_prompts(content: bytes, name: str) -> list[str]:
    """The evaluation prompts of a file, by its suffix; all also with ``.gz`` behind it.

    ``.jsonl`` and ``.ndjson`` hold objects with ``prompt`` (text or messages), ``.json`` an array of them, ``.csv`` a
    column ``prompt``, ``.txt`` a prompt a line. Text that begins with ``[`` or ``{`` is JSON under any of the first
    and last names. Of messages the user's turns count.

    Raises:
        DataError: the file is of another kind, empty, not UTF-8, or an entry has no prompt.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes[-1:] == [".gz"]:
        content, suffixes = _unzipped(content, name), suffixes[:-1]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in _SUFFIXES:
        raise _refused(name, f"the suffix {suffix}" if suffix else "no suffix")
    text = _text(content, name)
    if not text.strip():
        raise DataError(
            f"The evaluation prompts in {name} are empty",
            expected="JSON lines with prompt, or a prompt a line",
            fix="write prompts into it, or leave prepare.evaluation_prompts out",
        )
    if suffix == ".csv":
        return _csv_prompts(text, name)
    mark = text.lstrip()[0]
    if mark == "[":
        return _array_prompts(text, name)
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if mark == "{" or suffix != ".txt":
        return [_line_prompt(line, f"{name}, line {number}") for number, line in numbered]
    return [line for _, line in numbered]


def _refused(name: str, got: str) -> DataError:
    return DataError(
        f"The evaluation prompts in {name} cannot be read",
        got=got,
        expected=".jsonl, .json, .csv with a column prompt, or .txt with a prompt a line, as UTF-8 (also .gz)",
        fix="write the prompts as one of these",
    )


def _unzipped(content: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        raise _refused(name, "a .gz file that is damaged, or none") from None


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(name, not_utf8(error)) from None
    if "\0" in text:
        raise _refused(name, "NUL bytes, as UTF-16 and files that are no text have them")
    return text


def _csv_prompts(text: str, name: str) -> list[str]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    prompts = []
    try:
        header = next(rows)
        if header.count("prompt") != 1:
            columns = ", ".join(header)[:200]
            raise DataError(
                f"{name} has no column prompt" if "prompt" not in header else f"{name} has two columns prompt",
                got=f"the columns {columns}",
                expected="a header, with commas, of which one name is prompt",
                fix="rename the column of the prompts",
            )
        line = rows.line_num + 1
        for row in rows:
            where, line = f"{name}, line {line}", rows.line_num + 1
            if len(row) not in (0, len(header)):
                got = f"a row of {len(row)} cells below a header of {len(header)}"
                raise DataError(f"{where} is no row of the table", got=got, fix="quote cells that hold commas")
            if row:
                cell = row[header.index("prompt")]
                prompts.append(_prompt({"prompt": spelled_turns(cell) or cell}, where, "an empty cell"))
    except csv.Error as error:
        got = "a quotation mark that nothing closes, or text behind one that does"
        raise DataError(f"{name} is no CSV near line {rows.line_num}", got=got, fix="mend the quotes") from error
    if not prompts:
        raise DataError(
            f"The evaluation prompts in {name} are empty", got="a header alone", fix="write prompts into it"
        )
    return prompts


def _array_prompts(text: str, name: str) -> list[str]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        expected = f"an array of {_EXPECTED}, as it begins with ["
        fix = "mend the array, or write prompts as JSON lines with prompt"
        raise DataError(f"{name} is no JSON", got=why_undecodable(error), expected=expected, fix=fix) from None
    if not records:
        raise DataError(f"The evaluation prompts in {name} are empty", got="[]", fix="write prompts into it")
    return [
        _prompt(record, f"{name}, record {number}", json.dumps(record, ensure_ascii=False)[:80])
        for number, record in enumerate(records, 1)
    ]


def _line_prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON", got=why_undecodable(error), expected=_EXPECTED, fix=_FIX) from None
    return _prompt(record, where, line[:80])


def _prompt(record: Any, where: str, shown: str) -> str:
    prompt: Any = record["prompt"] if isinstance(record, dict) and "prompt" in record else None
    try:
        if not isinstance(prompt, str):
            prompt = "\n".join(turn.content for turn in read_turns(prompt, "prompt") if turn.role == "user")
    except RejectedError as error:
        got = error.rejection.detail if prompt is not None else shown
        raise DataError(f"{where} has no prompt", got=got, expected=_EXPECTED, fix=_FIX) from None
    if not prompt.strip():
        raise DataError(f"{where} has an empty prompt", expected="a prompt with text", fix=_FIX)
    return str(prompt)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _whole(text: str, words: list[str]) -> str:
    """What a short prompt is compared by: its words, or its signs where it has none."""
    return " ".join(words) or text.strip()


def _hash_grams(words: list[str], n: int) -> Hashes:
    """Hash of each n-gram, [len(words) - n + 1]: a polynomial in the words' hashes, modulo 2**64."""
    hashes = np.array([_hash_word(word) for word in words], dtype=np.uint64)
    total = np.zeros(len(words) - n + 1, dtype=np.uint64)
    for place in range(n):
        total = total * _FACTOR + hashes[place : place + len(total)]
    return total


@functools.lru_cache(maxsize=100_000)
def _hash_word(word: str) -> int:
    # The same in every process: Python's own hash is seeded.
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
