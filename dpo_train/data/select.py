"""Outcomes of all records to the pairs of each split, and every rejection. Pure, and independent of block order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.data.pairs import PAIR_SCHEMA, SPLITS


def split_of(group: str, *, seed: int, validation_fraction: float, heldout_fraction: float) -> str:
    """The split of a group: a function of its text alone, so that appending data moves nothing."""
    position = _unit_hash(f"split:{seed}:{group}")
    if position < heldout_fraction:
        return "heldout"
    return "validation" if position < heldout_fraction + validation_fraction else "train"


def select_pairs(
    outcomes: pa.Table, *, seed: int, limits: Mapping[str, int | None]
) -> tuple[dict[str, pa.Table], pa.Table]:
    """Drops duplicates and what goes beyond a split's limit.

    Args:
        outcomes: rows of OUTCOME_SCHEMA, one per record, in any order.
        seed: picks which pairs stay within a limit.
        limits: most pairs of each split; None for all.

    Returns:
        pairs by split in the order of their ids, and the rejections (source, line, reason, detail):
        ``len(outcomes) = sum of pairs + len(rejections)``.
    """
    outcomes = outcomes.sort_by([("source", "ascending"), ("line", "ascending")])
    reasons: list[str | None] = outcomes["reason"].to_pylist()
    details: list[str | None] = outcomes["detail"].to_pylist()
    ids: list[str | None] = outcomes["pair_id"].to_pylist()
    splits: list[str | None] = outcomes["split"].to_pylist()
    first: dict[str, int] = {}
    for index, pair_id in enumerate(ids):
        if reasons[index] is None and pair_id is not None:
            original = first.setdefault(pair_id, index)
            if original != index:
                reasons[index] = "duplicate"
                details[index] = f"of {outcomes['source'][original]} line {outcomes['line'][original]}"
    for split in SPLITS:
        limit = limits.get(split)
        kept = [i for i in first.values() if splits[i] == split]
        if limit is not None and len(kept) > limit:
            kept.sort(key=lambda i: _unit_hash(f"limit:{seed}:{ids[i]}"))
            for index in kept[limit:]:
                reasons[index] = "over_limit"
                details[index] = f"{split} is limited to {limit} pairs"
    table = outcomes.set_column(outcomes.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))
    table = table.set_column(table.column_names.index("detail"), "detail", pa.array(details, pa.string()))
    used = table.filter(pc.is_null(table["reason"]))
    rejections = table.filter(pc.is_valid(table["reason"])).select(["source", "line", "reason", "detail"])
    by_split = {
        split: used.filter(pc.equal(used["split"], split)).select(PAIR_SCHEMA.names).sort_by("pair_id")
        for split in SPLITS
    }
    return by_split, rejections


def counts(by_split: Mapping[str, pa.Table], rejections: pa.Table) -> dict[str, int]:
    """Counts for the record: ``records = used + rejected``, each reason and each split by name."""
    used = sum(len(table) for table in by_split.values())
    reasons = Counter(rejections["reason"].to_pylist())
    return {
        "records": used + len(rejections),
        "used": used,
        "rejected": len(rejections),
        **{f"rejected/{reason}": number for reason, number in sorted(reasons.items())},
        **{f"pairs/{split}": len(table) for split, table in by_split.items()},
        "truncated_answers": sum(pc.sum(table["truncated_answers"]).as_py() or 0 for table in by_split.values()),
    }


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
