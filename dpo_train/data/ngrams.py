"""Overlap of pairs with the prompts that a model will be evaluated on.

Words are runs of letters and digits, without case; n of them in a row make an n-gram. A million n-grams are 8 MB: only
their 64-bit hashes are kept, sorted. Of a thousand million n-grams compared with a million, one is mistaken for another
with a chance of 1e9 * 1e6 / 2**64, about 5e-5.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_train.data.formats.messages import read_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.pairs import PreferencePair
from dpo_train.data.sources.base import not_utf8
from dpo_train.data.sources.json_values import why_undecodable
from dpo_train.errors import DataError

Hashes = npt.NDArray[np.uint64]

_EXPECTED = '{"prompt": text or messages}'
_FIX = "mend or remove the line"
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
    """The evaluation prompts of a file: JSON lines with ``prompt`` (text or messages), or a prompt a line.

    Lines are JSON where the first that is not blank begins with ``{``. Of messages the user's turns count.

    Raises:
        DataError: the file is empty, not UTF-8, or a line has no prompt.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The evaluation prompts in {name} cannot be read",
            got=not_utf8(error),
            expected="UTF-8",
            fix="write the file as UTF-8",
        ) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(
            f"The evaluation prompts in {name} are empty",
            expected="JSON lines with prompt, or a prompt a line",
            fix="write prompts into it, or leave prepare.evaluation_prompts out",
        )
    if not numbered[0][1].startswith("{"):
        return [line for _, line in numbered]
    return [_prompt(line, f"{name}, line {number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
        prompt: Any = record["prompt"] if isinstance(record, dict) and "prompt" in record else None
        if not isinstance(prompt, str):
            prompt = "\n".join(turn.content for turn in read_turns(prompt, "prompt") if turn.role == "user")
    except RejectedError as error:
        got = error.rejection.detail if prompt is not None else line[:80]
        raise DataError(f"{where} has no prompt", got=got, expected=_EXPECTED, fix=_FIX) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON", got=why_undecodable(error), expected=_EXPECTED, fix=_FIX) from None
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
