"""Record types of preference data, and their layout on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.int32]
Logps = npt.NDArray[np.float32]

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``extra`` is a JSON object of what else a chat template reads: tool calls, a name."""

    role: str
    content: str
    extra: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a preferred and a less preferred answer, or with a ranking of more. Pairs of one ``group`` stay in
    one split."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    group: str
    tools: str = ""
    """JSON list of the tools that the prompt offers, for the chat template."""
    strength: float | None = None
    """How much better the chosen answer is, in the data's own unit; never negative."""
    agreement: float | None = None
    """Share of the annotators who agree with the preference, 0 to 1."""
    origin: str = ""
    """Where the data itself says that the record comes from."""
    others: tuple[Message, ...] = ()
    """Of a ranking the answers after ``chosen`` and ``rejected``, from the third to the worst. All answers differ."""

    @property
    def answers(self) -> tuple[Message, ...]:
        """All answers, best first."""
        return (self.chosen, self.rejected, *self.others)

    @property
    def prompt_key(self) -> str:
        """The prompt as one text: turns, and tools where there are any."""
        return json.dumps([[list(_parts(m)) for m in self.prompt], *([self.tools] if self.tools else [])])

    @property
    def pair_id(self) -> str:
        """Digest of the content: the same pair has the same id wherever it comes from."""
        chosen, rejected, *others = (m.content if not m.extra else [m.content, m.extra] for m in self.answers)
        more = [*([self.tools] if self.tools else []), *([others] if others else [])]
        content = [[list(_parts(m)) for m in self.prompt], chosen, rejected, *more]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _parts(message: Message) -> tuple[str, ...]:
    return (message.role, message.content, *([message.extra] if message.extra else []))


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a record is not used. ``reason`` is a fixed code, ``detail`` says what was found."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair or ranking, and once scored the reference's log-prob of each answer token."""

    pair_id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    reference_chosen_logps: Logps | None = None
    reference_rejected_logps: Logps | None = None
    other_ids: tuple[Ids, ...] = ()
    """Of a ranking the answers after ``chosen`` and ``rejected``, from the third to the worst."""
    reference_other_logps: tuple[Logps, ...] = ()

    @property
    def answer_ids(self) -> tuple[Ids, ...]:
        """All answers, best first."""
        return (self.chosen_ids, self.rejected_ids, *self.other_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair in a packed row, the prompt once."""
        others = sum(map(len, self.other_ids)) if self.other_ids else 0
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) + others

    @property
    def chosen_alone(self) -> TokenPair:
        """The pair without its other answers and without a reference: rows of such pairs hold no rejected token."""
        return TokenPair(self.pair_id, self.prompt_ids, self.chosen_ids, self.rejected_ids[:0])


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())]))
_ANSWERS = pa.list_(pa.struct([("content", pa.string()), ("extra", pa.string())]))
_IDS = pa.list_(pa.int32())
_LOGPS = pa.list_(pa.float32())

PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("prompt", _MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_extra", pa.string()),
        ("rejected_extra", pa.string()),
        ("others", _ANSWERS),
        ("tools", pa.string()),
        ("strength", pa.float64()),
        ("agreement", pa.float32()),
        ("origin", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("other_ids", pa.list_(_IDS)),
        ("truncated_prompt", pa.bool_()),
        ("truncated_chosen", pa.bool_()),
        ("truncated_rejected", pa.bool_()),
        ("truncated_others", pa.int32()),
        ("dataset", pa.int16()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("candidate", pa.int32()),
    ]
)
"""One row per pair or ranking. ``others`` and ``other_ids`` are a ranking's answers from the third on, null or
empty for a pair; ``truncated_others`` counts those that were cut. ``dataset`` is the place of its source in the config;
``source`` (a file), ``line`` and ``candidate`` (which pair of the record, from 0) say where it stands."""

OUTCOME_SCHEMA = pa.schema(
    [
        *PAIR_SCHEMA,
        ("prompt_hash", pa.uint64()),
        ("answers_hash", pa.uint64()),
        ("block", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""One row per candidate pair: a pair (reason null) or a rejection. A record of which no pair can be made is one
rejection.

``answers_hash`` is the same for both orders of two answers, and null for rankings; ``block`` is where the record was
read.
"""

_SCORES = (("chosen_logps", _LOGPS), ("rejected_logps", _LOGPS), ("other_logps", pa.list_(_LOGPS)))
SCORE_NAMES = tuple(name for name, _ in _SCORES)

SCORED_SCHEMA = pa.schema([*PAIR_SCHEMA, *((f"reference_{name}", kind) for name, kind in _SCORES)])
"""A pair with the reference's per-token log-probs of its answers."""

SCORES_SCHEMA = pa.schema([("pair_id", pa.string()), *_SCORES])
"""Per-token log-probs of a pair's answers under one policy."""


def token_pairs(table: pa.Table) -> list[TokenPair]:
    """Token pairs from rows of PAIR_SCHEMA or SCORED_SCHEMA."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    arrays = [_arrays(table[name], np.int32) for name in columns]
    is_scored = "reference_chosen_logps" in table.column_names
    if is_scored:
        arrays += [_arrays(table[f"reference_{side}_logps"], np.float32) for side in ("chosen", "rejected")]
    pairs = [TokenPair(*row) for row in zip(table["pair_id"].to_pylist(), *arrays, strict=True)]
    if not has_rankings(table):
        return pairs
    others: list[Sequence[Any]] = [_lists_of_arrays(table["other_ids"], np.int32)]
    others.append(_lists_of_arrays(table["reference_other_logps"], np.float32) if is_scored else [()] * len(pairs))
    return [
        replace(pair, other_ids=ids, reference_other_logps=logps)
        for pair, ids, logps in zip(pairs, *others, strict=True)
    ]


def _arrays(column: pa.ChunkedArray, dtype: type) -> list[npt.NDArray[np.generic]]:
    return [
        np.asarray(chunk.values[chunk.offsets[i].as_py() : chunk.offsets[i + 1].as_py()], dtype=dtype)
        for chunk in column.chunks
        for i in range(len(chunk))
    ]


def has_rankings(table: pa.Table) -> bool:
    """Whether some row of PAIR_SCHEMA or SCORED_SCHEMA has more than two answers."""
    if "other_ids" not in table.column_names:
        return False
    chunks = table["other_ids"].chunks
    return any(len(chunk) and chunk.offsets[0].as_py() < chunk.offsets[len(chunk)].as_py() for chunk in chunks)


def _lists_of_arrays(column: pa.ChunkedArray, dtype: type) -> list[tuple[npt.NDArray[np.generic], ...]]:
    found: list[tuple[npt.NDArray[np.generic], ...]] = []
    for chunk in column.chunks:
        ends = np.asarray(chunk.offsets)
        inner = _arrays(pa.chunked_array([chunk.values.slice(ends[0], ends[-1] - ends[0])]), dtype)
        found += [tuple(inner[start:end]) for start, end in itertools.pairwise((ends - ends[0]).tolist())]
    return found
