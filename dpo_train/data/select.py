"""Which candidate pairs are used: what the pairs of one data set say about each other. Pure.

Everything that two pairs can have to do with each other (the same pair, the opposite one, a prompt in two splits) shows
between pairs of one prompt. So pairs are divided by a hash of the prompt into buckets, each of which is decided by
itself, in any order and on any machine; only limits need numbers of all buckets, and those are one hash a pair.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.data.pairs import SPLITS

Keys = npt.NDArray[np.uint64]

PRIORITY = ("heldout", "validation", "train")
"""A prompt that stands in two splits stays in the first of these: what measures comes before what is trained on."""

_ORDER = [("dataset", "ascending"), ("source", "ascending"), ("line", "ascending"), ("candidate", "ascending")]


def hash64(text: str) -> int:
    """The first eight bytes of SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(group: str, *, seed: int, validation_fraction: float, heldout_fraction: float) -> str:
    """The split of a group: a function of its text alone, so that appending data moves nothing."""
    position = hash64(f"split:{seed}:{group}") / 2**64
    if position < heldout_fraction:
        return "heldout"
    return "validation" if position < heldout_fraction + validation_fraction else "train"


@dataclass(frozen=True)
class Limit:
    """Of the pairs of a split (of one source, or of all: None) those whose key is not above ``highest_key`` stay."""

    split: str
    dataset: int | None
    highest_key: int
    reason: str
    detail: str


class Decided(NamedTuple):
    """What becomes of some candidates: for each row, in the order of the table that was asked about."""

    reasons: list[str | None]
    details: list[str | None]
    order: list[int]
    """The rows' places in the order in which they stand in the data."""


NARROW = (
    "reason",
    "detail",
    "pair_id",
    "split",
    "prompt_hash",
    "answers_hash",
    "dataset",
    "source",
    "line",
    "candidate",
)
"""The columns that a decision looks at: no texts, no tokens."""


def decide(outcomes: pa.Table, *, seed: int, limits: Sequence[Limit] = ()) -> Decided:
    """Rejects duplicates, contradictions, prompts in two splits, and what goes beyond a limit.

    Args:
        outcomes: all candidates of some prompts, rows of PART_SCHEMA (at least NARROW) in any order.
        seed: picks which pairs stay within a limit.
    """
    order = pc.sort_indices(outcomes, _ORDER).to_pylist()
    columns = {name: outcomes[name].to_pylist() for name in NARROW}
    rows = _Rows(
        reasons=columns["reason"],
        details=columns["detail"],
        ids=columns["pair_id"],
        splits=columns["split"],
        prompts=columns["prompt_hash"],
        answers=columns["answers_hash"],
        datasets=columns["dataset"],
        sources=columns["source"],
        lines=columns["line"],
        order=order,
    )
    _reject_duplicates(rows)
    _reject_contradictions(rows)
    _reject_shared_prompts(rows)
    for limit in limits:
        _reject_beyond(rows, limit, seed)
    return Decided(rows.reasons, rows.details, order)


def keys(pair_ids: Sequence[str], seed: int) -> Keys:
    """By which pairs are chosen where there are too many: the lowest stay, whatever else the data hold."""
    return np.fromiter((hash64(f"limit:{seed}:{pair_id}") for pair_id in pair_ids), np.uint64, len(pair_ids))


def limits_for(
    keys_by_source: Mapping[tuple[str, int], Keys],
    most: Mapping[str, int | None],
    weights: Sequence[float | None],
) -> list[Limit]:
    """The limits that leave at most ``most`` pairs of each split, and training pairs in proportion to the weights.

    Args:
        keys_by_source: the keys of all pairs that could be used, by split and index of the source.
        most: pairs of each split; None for all.
        weights: of each source; all None for no proportion.
    """
    found = []
    for split in SPLITS:
        here = {index: array for (name, index), array in sorted(keys_by_source.items()) if name == split and len(array)}
        limit = most.get(split)
        if split == "train" and any(weight is not None for weight in weights):
            found += _weighted(here, limit, [weight or 0.0 for weight in weights])
        elif limit is not None and here and sum(map(len, here.values())) > limit:
            highest = _nth(np.concatenate(list(here.values())), limit)
            found.append(Limit(split, None, highest, "over_limit", f"{split} is limited to {limit} pairs"))
    return found


def _weighted(by_source: Mapping[int, Keys], limit: int | None, weights: Sequence[float]) -> list[Limit]:
    """The largest mixture in proportion to the weights that the sources can give without repeating a pair."""
    if not by_source:
        return []
    total = sum(weights[index] for index in by_source)
    unit = min(len(array) / weights[index] for index, array in by_source.items())
    if limit is not None:
        unit = min(unit, limit / total)
    # The source that sets the unit gives all it has; a product of floats may fall just short of that.
    shares = {index: min(unit * weights[index] + 1e-6, len(array)) for index, array in by_source.items()}
    wanted = {index: int(share) for index, share in shares.items()}
    # Rounding down would lose pairs that the limit allows: the largest remainders get them.
    spare = min(round(unit * total), sum(map(len, by_source.values()))) - sum(wanted.values())
    for index in sorted(shares, key=lambda i: int(shares[i]) - shares[i])[: max(spare, 0)]:
        wanted[index] = min(wanted[index] + 1, len(by_source[index]))
    return [
        Limit(
            "train",
            index,
            _nth(array, wanted[index]),
            "over_weight",
            f"by the weights {wanted[index]} of this source's {len(array)} training pairs are used",
        )
        for index, array in by_source.items()
        if wanted[index] < len(array)
    ]


def _nth(array: Keys, count: int) -> int:
    """The highest key of the ``count`` lowest; -1 for none. Two equal keys among 64-bit hashes do not happen."""
    return int(np.partition(array, count - 1)[count - 1]) if count else -1


@dataclass
class _Rows:
    reasons: list[str | None]
    details: list[str | None]
    ids: list[str | None]
    splits: list[str | None]
    prompts: list[int]
    answers: list[int | None]
    datasets: list[int]
    sources: list[str]
    lines: list[int]
    order: list[int]

    def used(self) -> list[int]:
        return [index for index in self.order if self.reasons[index] is None]

    def reject(self, index: int, reason: str, detail: str) -> None:
        self.reasons[index], self.details[index] = reason, detail

    def place(self, index: int) -> str:
        return f"{self.sources[index]} line {self.lines[index]}"


def _reject_duplicates(rows: _Rows) -> None:
    """Within a split; of equal pairs in two splits the shared prompt decides."""
    first: dict[tuple[str | None, str | None], int] = {}
    for index in rows.used():
        original = first.setdefault((rows.ids[index], rows.splits[index]), index)
        if original != index:
            rows.reject(index, "duplicate", f"of {rows.place(original)}")


def _reject_contradictions(rows: _Rows) -> None:
    """A over B and B over A: nothing says which is right, so neither is used. Rankings are not compared."""
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in rows.used():
        answers = rows.answers[index]
        if answers is not None:
            seen[rows.prompts[index], answers].append(index)
    for same in seen.values():
        for index in same:
            opposite = next((other for other in same if rows.ids[other] != rows.ids[index]), None)
            if opposite is not None:
                rows.reject(index, "contradiction", f"{rows.place(opposite)} prefers the other answer")


def _reject_shared_prompts(rows: _Rows) -> None:
    splits: dict[int, set[str]] = defaultdict(set)
    used = rows.used()
    for index in used:
        splits[rows.prompts[index]].add(str(rows.splits[index]))
    for index in used:
        found = splits[rows.prompts[index]]
        if len(found) > 1:
            stays = next(split for split in PRIORITY if split in found)
            if rows.splits[index] != stays:
                rows.reject(index, f"prompt_in_{stays}", f"the prompt also stands in a pair of {stays}")


def _reject_beyond(rows: _Rows, limit: Limit, seed: int) -> None:
    concerned = [
        index
        for index in rows.used()
        if rows.splits[index] == limit.split and limit.dataset in {None, rows.datasets[index]}
    ]
    found = keys([str(rows.ids[index]) for index in concerned], seed)
    for index, key in zip(concerned, found.tolist(), strict=True):
        if key > limit.highest_key:
            rows.reject(index, limit.reason, limit.detail)
