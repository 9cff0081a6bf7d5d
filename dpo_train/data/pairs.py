"""Record types of preference data, and their layout on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.int32]
Logps = npt.NDArray[np.float32]

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a preferred and a less preferred answer. Pairs of one ``group`` stay in one split."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    group: str

    @property
    def pair_id(self) -> str:
        """Digest of the content: the same pair has the same id wherever it comes from."""
        content = [[m.role, m.content] for m in self.prompt], self.chosen, self.rejected
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a record is not used. ``reason`` is a fixed code, ``detail`` says what was found."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair, and once scored the reference's log-prob of each answer token."""

    pair_id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    reference_chosen_logps: Logps | None = None
    reference_rejected_logps: Logps | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair in a packed row, the prompt once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
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
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("truncated_answers", pa.int8()),
        ("source", pa.string()),
        ("line", pa.int64()),
    ]
)
"""One row per pair. ``source`` and ``line`` say where the record stands."""

OUTCOME_SCHEMA = pa.schema([*PAIR_SCHEMA, ("reason", pa.string()), ("detail", pa.string())])
"""One row per record: a pair (reason null) or a rejection."""

SCORED_SCHEMA = pa.schema([*PAIR_SCHEMA, ("reference_chosen_logps", _LOGPS), ("reference_rejected_logps", _LOGPS)])
"""A pair with the reference's per-token log-probs of its answers."""


SCORES_SCHEMA = pa.schema([("pair_id", pa.string()), ("chosen_logps", _LOGPS), ("rejected_logps", _LOGPS)])
"""Log-probs of both answers under one policy."""


def token_pairs(table: pa.Table) -> list[TokenPair]:
    """Token pairs from rows of PAIR_SCHEMA or SCORED_SCHEMA."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    arrays = [_arrays(table[name], np.int32) for name in columns]
    if "reference_chosen_logps" in table.column_names:
        arrays += [_arrays(table[f"reference_{side}_logps"], np.float32) for side in ("chosen", "rejected")]
    return [TokenPair(*row) for row in zip(table["pair_id"].to_pylist(), *arrays, strict=True)]


def _arrays(column: pa.ChunkedArray, dtype: type) -> list[npt.NDArray[np.generic]]:
    return [
        np.asarray(chunk.values[chunk.offsets[i].as_py() : chunk.offsets[i + 1].as_py()], dtype=dtype)
        for chunk in column.chunks
        for i in range(len(chunk))
    ]
