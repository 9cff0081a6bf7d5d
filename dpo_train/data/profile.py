"""What came in and what became of it, in a few kilobytes: statistics of candidate pairs that add up over workers.

    part of the candidate pairs --profile--> Profile --merge--> Profile of all --report.py--> report.json, report.html

Everything is a count or an exact histogram (value -> how often), so that merging in any order gives the same numbers.
The examples are those with the smallest hash, which is a choice that no order can change either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.data.shards import other_lengths

Histogram = Mapping[int, int]

KEPT = ""
"""Stands for the reason where there is none."""
UNKNOWN_SOURCE = -1

EXCERPT_CHARS = 300
NAME_CHARS = 120
# Names of origins are the data's own, so their number has no bound; beyond this many a sample by hash is kept.
MAX_ORIGINS = 10_000

PARTS = ("prompt", "chosen", "rejected")
LENGTHS = (*PARTS, "pair", "difference", "train_prompt", "train_pair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One candidate pair as people see it; texts are excerpts, and empty where texts are withheld."""

    order: int
    """Hash by which examples are chosen: the smallest stay."""
    reason: str
    dataset: int
    source: str
    line: int
    candidate: int
    detail: str
    prompt: str
    chosen: str
    rejected: str
    tokens: tuple[int, int, int] | None
    """Lengths of prompt, chosen and rejected, where the pair came as far as being tokenised."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Statistics of candidate pairs. Lengths are in tokens and of kept pairs."""

    sources: tuple[str, ...]
    """Labels of the config's sources, by their place."""
    max_examples: int
    redact: bool
    seed: int

    records: Histogram
    """Records by source."""
    used: Histogram
    """Records by source that gave at least one kept pair."""
    cells: Mapping[tuple[int, str, str], int]
    """Candidate pairs by (source, reason or KEPT, split or ""): all other counts of pairs are sums of these."""
    origins: Mapping[str, tuple[int, int]]
    """(kept, rejected) by where the data says that a record comes from; under ``redact`` by a digest of that."""
    truncated: Mapping[str, int]
    """Kept pairs by the part that was cut: prompt, chosen, rejected; any: at least one of them. Of rankings also
    others: answers from the third on that were cut."""
    lengths: Mapping[str, Histogram]
    """By name of LENGTHS. pair: prompt + all answers; difference: chosen - rejected."""
    strength: Mapping[float, int]
    """Kept pairs by strength, to three significant digits; unknown ones are left out."""
    agreement: Mapping[float, int]
    prompts: int
    """Different prompts among kept pairs."""
    max_pairs_of_prompt: int
    examples: tuple[Example, ...]

    def to_json(self) -> str:
        """The profile as text that ``from_json`` reads back."""
        plain = dict(vars(self))
        for name in ("records", "used", "strength", "agreement"):
            plain[name] = list(vars(self)[name].items())
        plain["cells"] = [[*key, count] for key, count in self.cells.items()]
        plain["origins"] = [[name, *counts] for name, counts in self.origins.items()]
        plain["lengths"] = {name: list(histogram.items()) for name, histogram in self.lengths.items()}
        plain["examples"] = [[getattr(item, name) for name in Example.__slots__] for item in self.examples]
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The profile that ``to_json`` wrote."""
        plain: dict[str, Any] = json.loads(text)
        for name in ("records", "used", "strength", "agreement"):
            plain[name] = dict(plain[name])
        plain["sources"] = tuple(plain["sources"])
        plain["cells"] = {(dataset, reason, split): count for dataset, reason, split, count in plain["cells"]}
        plain["origins"] = {name: (kept, rejected) for name, kept, rejected in plain["origins"]}
        plain["lengths"] = {name: dict(histogram) for name, histogram in plain["lengths"].items()}
        examples = [dict(zip(Example.__slots__, row, strict=True)) for row in plain["examples"]]
        plain["examples"] = tuple(
            Example(**{**row, "tokens": None if row["tokens"] is None else tuple(row["tokens"])}) for row in examples
        )
        return cls(**plain)


def profile(table: pa.Table, *, sources: Sequence[str], examples: int, redact: bool, seed: int) -> Profile:
    """Statistics of some of the candidate pairs.

    Args:
        table: rows of OUTCOME_SCHEMA, one per candidate pair. Each record has one candidate whose number is 0 (or
            null), wherever it is; all kept pairs of a prompt, and so of a record, stand in one table.
        sources: label of each source of the config.
        examples: most examples of each reason (and of kept pairs) from each source.
        redact: keep no text of a record, nor the details of rejections, which may quote it.
        seed: chooses the examples.
    """
    kept = _numbers(table).filter(pc.is_null(table["reason"]))
    first = table.select(["dataset"]).filter(pc.less_equal(pc.fill_null(table["candidate"], 0), 0))
    of_record = _group(kept, "dataset", "source", "line")
    of_prompt = _group(kept, "prompt_hash")
    return Profile(
        sources=tuple(sources),
        max_examples=examples,
        redact=redact,
        seed=seed,
        records=_sum((_place(row["dataset"]), row["count_all"]) for row in _group(first, "dataset").to_pylist()),
        used=_sum((_place(row["dataset"]), row["count_all"]) for row in _group(of_record, "dataset").to_pylist()),
        cells=_sum(
            ((_place(row["dataset"]), row["reason"] or KEPT, row["split"] or ""), row["count_all"])
            for row in _group(table, "dataset", "reason", "split").to_pylist()
        ),
        origins=_origins(table, redact=redact, seed=seed),
        truncated=_truncated(kept),
        lengths=_lengths(kept),
        strength=_rounded_histogram(kept["strength"]),
        agreement=_rounded_histogram(kept["agreement"]),
        prompts=len(of_prompt),
        max_pairs_of_prompt=pc.max(of_prompt["count_all"]).as_py() or 0,
        examples=_examples(table, limit=examples, redact=redact, seed=seed),
    )


def merge(a: Profile, b: Profile) -> Profile:
    """The profile of both parts together; commutative and associative.

    Raises:
        ValueError: the two were made with different settings.
    """
    settings = [(p.sources, p.max_examples, p.redact, p.seed) for p in (a, b)]
    if settings[0] != settings[1]:
        raise ValueError(f"profiles of different settings cannot be merged: {settings[0]} and {settings[1]}")
    return Profile(
        sources=a.sources,
        max_examples=a.max_examples,
        redact=a.redact,
        seed=a.seed,
        records=_add(a.records, b.records),
        used=_add(a.used, b.used),
        cells=_add(a.cells, b.cells),
        origins=_bounded(_add_counts(a.origins, b.origins)),
        truncated=_add(a.truncated, b.truncated),
        lengths={name: _add(a.lengths[name], b.lengths[name]) for name in LENGTHS},
        strength=_add(a.strength, b.strength),
        agreement=_add(a.agreement, b.agreement),
        prompts=a.prompts + b.prompts,
        max_pairs_of_prompt=max(a.max_pairs_of_prompt, b.max_pairs_of_prompt),
        examples=_smallest([*a.examples, *b.examples], a.max_examples),
    )


def excerpt(text: str) -> str:
    """At most EXCERPT_CHARS characters: the whole, or start and end."""
    if len(text) <= EXCERPT_CHARS:
        return text
    return f"{text[:199]} … {text[-98:]}"


def _numbers(table: pa.Table) -> pa.Table:
    """Lengths in place of the token ids, and no texts: so little that filtering it costs nothing."""
    names = ["dataset", "source", "line", "split", "prompt_hash", "strength", "agreement", "truncated_others"]
    small = table.select([*names, *(f"truncated_{part}" for part in PARTS)])
    for part in PARTS:
        small = small.append_column(part, pc.list_value_length(table[f"{part}_ids"]))
    others = np.zeros(len(table), np.int64)
    np.add.at(others, *other_lengths(table, "other_ids"))
    return small.append_column("others", pa.array(others))


def _lengths(kept: pa.Table) -> dict[str, Histogram]:
    prompt, chosen, rejected = (_as_int(kept[part]) for part in PARTS)
    train = np.asarray(pc.fill_null(pc.equal(kept["split"], "train"), False), dtype=bool)
    pair = prompt + chosen + rejected + _as_int(kept["others"])
    values = (prompt, chosen, rejected, pair, chosen - rejected, prompt[train], pair[train])
    return {name: _histogram(value) for name, value in zip(LENGTHS, values, strict=True)}


def _truncated(kept: pa.Table) -> dict[str, int]:
    flags = {part: np.asarray(pc.fill_null(kept[f"truncated_{part}"], False), dtype=bool) for part in PARTS}
    others = _as_int(kept["truncated_others"])
    flags["any"] = np.logical_or.reduce([*flags.values(), others > 0])
    found = {part: int(flag.sum()) for part, flag in flags.items()}
    # Of rankings alone, and a number of answers.
    return found | ({"others": int(others.sum())} if others.any() else {})


def _rounded_histogram(column: pa.ChunkedArray) -> dict[float, int]:
    """Counts by value to three significant digits: exact for scores as people give them, and of bounded size."""
    values = np.asarray(pc.drop_null(column), dtype=np.float64)
    values = values[np.isfinite(values)]
    unique, counts = np.unique(values, return_counts=True)
    return _sum((float(f"{value:.3g}"), int(count)) for value, count in zip(unique, counts, strict=True))


def _origins(table: pa.Table, *, redact: bool, seed: int) -> dict[str, tuple[int, int]]:
    names = pc.utf8_slice_codeunits(pc.fill_null(table["origin"], ""), 0, NAME_CHARS)
    grouped = _group(pa.table({"origin": names, "kept": pc.is_null(table["reason"])}), "origin", "kept")
    found: dict[str, tuple[int, int]] = {}
    for row in grouped.to_pylist():
        name = _digest(f"{seed}:{row['origin']}") if redact and row["origin"] else row["origin"]
        kept, rejected = found.get(name, (0, 0))
        more = row["count_all"]
        found[name] = (kept + more, rejected) if row["kept"] else (kept, rejected + more)
    return _bounded(found)


def _bounded(origins: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The MAX_ORIGINS origins of the smallest digests: whichever way parts are merged, the same, with exact counts."""
    names: Iterable[str] = origins
    if len(origins) > MAX_ORIGINS:
        names = sorted(origins, key=_digest)[:MAX_ORIGINS]
    return {name: origins[name] for name in sorted(names)}


def _examples(table: pa.Table, *, limit: int, redact: bool, seed: int) -> tuple[Example, ...]:
    if not limit or not len(table):
        return ()
    order, key = _order(table, seed), _kind(table)
    by_key = np.lexsort((order, key))
    starts = np.r_[0, np.flatnonzero(np.diff(key[by_key])) + 1]
    sizes = np.diff(np.r_[starts, len(by_key)])
    rank = np.arange(len(by_key)) - np.repeat(starts, sizes)
    chosen = by_key[rank < limit]
    return _smallest([_example(table.slice(int(i), 1), int(order[i]), redact=redact) for i in chosen], limit)


def _order(table: pa.Table, seed: int) -> npt.NDArray[np.uint64]:
    """A hash of where each row stands, in 63 bits."""
    files = pc.unique(table["source"])
    hashes = np.array([int(_digest(f"{seed}:{name}"), 16) for name in files.to_pylist()], dtype=np.uint64)
    mixed = hashes[_as_int(pc.index_in(table["source"], value_set=files))]
    for name in ("dataset", "line", "candidate"):
        # The finaliser of SplitMix64 (Steele et al. 2014), once for each number.
        mixed = mixed + _as_int(table[name]).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed >> np.uint64(1)


def _kind(table: pa.Table) -> npt.NDArray[np.int64]:
    """A number for each (source, reason)."""
    reasons = pc.unique(table["reason"])
    reason = _as_int(pc.index_in(table["reason"], value_set=reasons))
    return _as_int(table["dataset"], missing=UNKNOWN_SOURCE) * (len(reasons) + 1) + reason


def _example(row: pa.Table, order: int, *, redact: bool) -> Example:
    value = {name: row[name][0].as_py() for name in ("reason", "dataset", "source", "line", "candidate")}
    lengths = [pc.list_value_length(row[f"{part}_ids"])[0].as_py() for part in PARTS]
    texts = dict.fromkeys(("detail", *PARTS), "")
    if not redact:
        turns = [_turn(turn["content"], turn["extra"], turn["role"]) for turn in row["prompt"][0].as_py() or ()]
        answers = (_turn(row[side][0].as_py(), row[f"{side}_extra"][0].as_py()) for side in ("chosen", "rejected"))
        whole = (row["detail"][0].as_py() or "", "\n".join(turns), *answers)
        texts = {name: excerpt(text) for name, text in zip(texts, whole, strict=True)}
    return Example(
        order=order,
        reason=value["reason"] or KEPT,
        dataset=_place(value["dataset"]),
        source=value["source"] or "",
        line=value["line"] or 0,
        candidate=value["candidate"] or 0,
        tokens=None if None in lengths else (lengths[0], lengths[1], lengths[2]),
        **texts,
    )


def _turn(content: str | None, extra: str | None, role: str | None = None) -> str:
    text = " ".join(part for part in (content, extra) if part)
    return text if role is None else f"{role}: {text}"


def _smallest(examples: Iterable[Example], limit: int) -> tuple[Example, ...]:
    """The ``limit`` examples of the smallest order of each (source, reason), sorted."""
    stay: list[Example] = []
    counts: dict[tuple[int, str], int] = {}
    for item in sorted(examples, key=lambda e: (e.reason, e.dataset, e.order, e.source, e.line, e.candidate)):
        kind = (item.dataset, item.reason)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= limit:
            stay.append(item)
    return tuple(stay)


def _group(table: pa.Table, *names: str) -> pa.Table:
    """Rows counted by the values of some columns, in ``count_all``."""
    return table.select(list(names)).group_by(list(names)).aggregate([([], "count_all")])


def _histogram(values: npt.NDArray[np.int64]) -> dict[int, int]:
    unique, counts = np.unique(values, return_counts=True)
    return dict(zip(unique.tolist(), counts.tolist(), strict=True))


def _as_int(column: pa.ChunkedArray, missing: int = 0) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.cast(column, pa.int64()), missing), dtype=np.int64)


def _place(dataset: int | None) -> int:
    return UNKNOWN_SOURCE if dataset is None else dataset


def _sum(items: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for key, count in items:
        total[key] = total.get(key, 0) + count
    return dict(sorted(total.items()))


def _add(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
    return _sum([*a.items(), *b.items()])


def _add_counts(a: Mapping[str, tuple[int, int]], b: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    both = {name: (a.get(name, (0, 0)), b.get(name, (0, 0))) for name in {*a, *b}}
    return {name: (x[0] + y[0], x[1] + y[1]) for name, (x, y) in both.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
