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


def decide(outcomes: pa.Table, *, seed: int, limits: Sequence[Limit] = ()) -> pa.Table:
    """Rejects duplicates, contradictions, prompts in two splits, and what goes beyond a limit.

    Args:
        outcomes: all candidates of some prompts, rows of OUTCOME_SCHEMA in any order.
        seed: picks which pairs stay within a limit.

    Returns:
        the same rows in the order in which they stand in the data, with more of them rejected.
    """
    outcomes = outcomes.sort_by(_ORDER)
    columns = ("reason", "detail", "pair_id", "split", "prompt_hash", "source", "line", "dataset")
    rows = _Rows(*(outcomes[name].to_pylist() for name in columns))
    _reject_duplicates(rows)
    _reject_contradictions(rows, outcomes)
    _reject_shared_prompts(rows)
    for limit in limits:
        _reject_beyond(rows, limit, seed)
    for name, values in (("reason", rows.reasons), ("detail", rows.details)):
        outcomes = outcomes.set_column(outcomes.column_names.index(name), name, pa.array(values, pa.string()))
    return outcomes


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
    unit = min(len(array) / weights[index] for index, array in by_source.items())
    if limit is not None:
        unit = min(unit, limit / sum(weights[index] for index in by_source))
    found = []
    for index, array in by_source.items():
        # The source that sets the unit gives all it has; a product of floats may fall just short of that.
        wanted = int(unit * weights[index] + 1e-6)
        if wanted < len(array):
            detail = f"by the weights {wanted} of this source's {len(array)} training pairs are used"
            found.append(Limit("train", index, _nth(array, wanted), "over_weight", detail))
    return found


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
    sources: list[str]
    lines: list[int]
    datasets: list[int]

    def used(self) -> list[int]:
        return [index for index, reason in enumerate(self.reasons) if reason is None]

    def reject(self, index: int, reason: str, detail: str) -> None:
        self.reasons[index], self.details[index] = reason, detail

    def place(self, index: int) -> str:
        return f"{self.sources[index]} line {self.lines[index]}"


def _reject_duplicates(rows: _Rows) -> None:
    first: dict[str | None, int] = {}
    for index in rows.used():
        original = first.setdefault(rows.ids[index], index)
        if original != index:
            rows.reject(index, "duplicate", f"of {rows.place(original)}")


def _reject_contradictions(rows: _Rows, outcomes: pa.Table) -> None:
    """A over B and B over A: nothing says which is right, so neither is used. Rankings are not compared."""
    names = ("chosen", "chosen_extra", "rejected", "rejected_extra")
    chosen, chosen_extra, rejected, rejected_extra = (outcomes[name].to_pylist() for name in names)
    is_ranking = pc.greater(pc.fill_null(pc.list_value_length(outcomes["others"]), 0), 0).to_pylist()
    seen: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index in rows.used():
        if is_ranking[index]:
            continue
        answers = ((chosen[index], chosen_extra[index]), (rejected[index], rejected_extra[index]))
        seen[(rows.prompts[index], *sorted(answers))].append(index)
    # Duplicates are gone: two pairs of the same answers are opposite ones.
    for pair in seen.values():
        for index, other in zip(pair, reversed(pair), strict=True):
            if index != other:
                rows.reject(index, "contradiction", f"{rows.place(other)} prefers the other answer")


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
