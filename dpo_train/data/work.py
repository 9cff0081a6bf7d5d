"""The two halves of preparing data, each a function that a worker applies to one piece at a time.

    block of raw records --PrepareBlock--> parts: candidates in the order of their prompts' hashes    (work/*.arrow)
    all parts            --FinishBucket--> of one range of hashes: shards of pairs, rejections, a profile

What is large goes from file to file; only names and numbers pass through the driver. A part is written whenever so many
bytes have come together and a bucket is a range of hashes chosen by size, so memory does not grow with the data. (Pairs
of one prompt are decided together: of those, ids and places are held, some hundred bytes each.)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.artifacts import local_copy, mirror
from dpo_train.config import PrepareConfig
from dpo_train.data.formats import candidates
from dpo_train.data.ngrams import Overlap
from dpo_train.data.pairs import OUTCOME_SCHEMA, PAIR_SCHEMA, SPLITS, PreferencePair, Rejection
from dpo_train.data.profile import profile
from dpo_train.data.rankings import Encoded, encode_all
from dpo_train.data.select import NARROW, Limit, decide, hash64, keys, split_of
from dpo_train.data.shards import Shard, shard_name, write_shard_of
from dpo_train.data.sources import Block, BlockReader, Record
from dpo_train.data.tokens import PairTokenizer

WORK = "work"
CANDIDATES_AT_ONCE, TEXT_AT_ONCE = 512, 8 << 20
"""What is tokenised in one go: so many candidates, or characters."""
PART_BYTES = 16 << 20
BUCKET_BYTES, MOST_BUCKETS = 24 << 20, 1024
"""Of candidates, texts and token ids. Beyond some 8 million records buckets grow rather than their number: every bucket
looks at every part."""
ROWS_AT_ONCE = 1024
COPIED_BYTES = 1 << 20

HASHES = 1 << 64

PARTS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("lines", pa.int64()),
        ("read_bytes", pa.int64()),
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("lowest", pa.uint64()),
        ("highest", pa.uint64()),
    ]
)
"""What PrepareBlock tells: a row for each block (its lines and bytes), one for each part (its rows, bytes, hashes)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what becomes of a record; picklable."""

    section: PrepareConfig
    seed: int
    formats: Sequence[str]
    """Of each source."""
    evaluation_prompts: Sequence[str]
    home: str
    """Where the output belongs."""


class PrepareBlock:
    """Blocks of raw records to parts of candidates (OUTCOME_SCHEMA); built once per worker."""

    def __init__(self, recipe: Recipe, tokenizer: PairTokenizer) -> None:
        self._recipe, self._tokenizer = recipe, tokenizer
        self._sources = recipe.section.all_sources
        prompts = recipe.evaluation_prompts
        self._overlap = Overlap(prompts, recipe.section.evaluation_ngram) if prompts else None

    def __call__(self, blocks: pa.Table) -> pa.Table:
        told: list[dict[str, Any]] = []
        first = blocks["block"][0].as_py()
        folder = local_copy(self._recipe.home)
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        for index, table in enumerate(_gathered(self._tables(blocks.to_pylist(), told))):
            name = f"{WORK}/part-{first:06d}-{index:04d}.arrow"
            written = _write_part(table, folder / name)
            mirror(self._recipe.home).publish(name)
            told.append({"file": name, **written})
        return pa.Table.from_pylist(told, schema=PARTS_SCHEMA)

    def _tables(self, blocks: Sequence[Mapping[str, Any]], told: list[dict[str, Any]]) -> Iterator[pa.Table]:
        """Candidates of all blocks, some at a time."""
        waiting: list[tuple[dict[str, Any], PreferencePair | Rejection, str | None]] = []
        size = 0
        for fields in blocks:
            number = fields["block"]
            block = Block(**{name: value for name, value in fields.items() if name != "block"})
            reader = BlockReader(block)
            for record in reader:
                for place, candidate in self._candidates(number, block, record):
                    waiting.append((place, candidate, self._sources[block.dataset].split))
                    size += _text_size(candidate)
                    if len(waiting) >= CANDIDATES_AT_ONCE or size >= TEXT_AT_ONCE:
                        yield self._outcomes(waiting)
                        waiting, size = [], 0
            told.append({"block": number, "lines": reader.lines, "read_bytes": block.size_bytes})
        if waiting:
            yield self._outcomes(waiting)

    def _candidates(
        self, number: int, block: Block, record: Record
    ) -> Iterator[tuple[dict[str, Any], PreferencePair | Rejection]]:
        """What a record makes, each with its place; at least one."""
        made = candidates(record.value, self._sources[block.dataset], self._recipe.formats[block.dataset])
        prompt = next((pair.prompt_key for pair in made if isinstance(pair, PreferencePair)), None)
        # All candidates of a record go into one bucket, where it is counted as used or rejected.
        hashed = hash64(prompt if prompt is not None else f"{block.name}\0{block.start}\0{record.line}")
        for index, candidate in enumerate(made):
            place = {
                "dataset": block.dataset,
                "source": block.name,
                "block": number,
                "line": record.line,
                "candidate": index,
                "made": len(made),
                "prompt_hash": hashed,
            }
            yield place, candidate

    def _outcomes(self, found: Sequence[tuple[dict[str, Any], PreferencePair | Rejection, str | None]]) -> pa.Table:
        """Candidates as rows. An answer that leaves its ranking is a rejection behind the record's candidates."""
        pairs = [candidate for _, candidate, _ in found if isinstance(candidate, PreferencePair)]
        encoded = iter(self._encode(pairs))
        rows: list[dict[str, Any]] = []
        for place, candidate, split in found:
            if isinstance(candidate, Rejection):
                rows.append(place | dataclasses.asdict(candidate))
                continue
            tokens = next(encoded)
            rows.append(place | self._row(tokens, split))
            rows += [
                place | {"candidate": number} | dataclasses.asdict(dropped)
                for number, dropped in enumerate(tokens.dropped, place["made"])
            ]
        return _table(rows)

    def _encode(self, pairs: Sequence[PreferencePair]) -> list[Encoded]:
        encoded = encode_all(self._tokenizer, pairs)
        if self._overlap is None:
            return encoded
        found = [self._overlap.overlaps(pair) for pair in pairs]
        return [
            item
            if ngram is None or isinstance(item.result, Rejection)
            else Encoded(item.pair, Rejection("evaluation_overlap", ngram))
            for ngram, item in zip(found, encoded, strict=True)
        ]

    def _row(self, found: Encoded, split: str | None) -> dict[str, Any]:
        section, pair, encoded = self._recipe.section, found.pair, found.result
        row: dict[str, Any] = {
            "pair_id": pair.pair_id if isinstance(encoded, Rejection) else encoded.tokens.pair_id,
            "answers_hash": None if pair.others else _answers_hash(pair),
            "group": pair.group,
            "split": split
            or split_of(
                pair.group,
                seed=self._recipe.seed,
                validation_fraction=section.validation_fraction,
                heldout_fraction=section.heldout_fraction,
            ),
            "prompt": [{"role": m.role, "content": m.content, "extra": m.extra} for m in pair.prompt],
            "chosen": pair.chosen.content,
            "rejected": pair.rejected.content,
            "chosen_extra": pair.chosen.extra,
            "rejected_extra": pair.rejected.extra,
            "others": [{"content": m.content, "extra": m.extra} for m in pair.others],
            "tools": pair.tools,
            "strength": pair.strength,
            "agreement": pair.agreement,
            "origin": pair.origin,
        }
        if isinstance(encoded, Rejection):
            return row | dataclasses.asdict(encoded)
        return row | {
            "prompt_ids": encoded.tokens.prompt_ids,
            "chosen_ids": encoded.tokens.chosen_ids,
            "rejected_ids": encoded.tokens.rejected_ids,
            "other_ids": encoded.tokens.other_ids,
            "truncated_prompt": encoded.truncated_prompt,
            "truncated_chosen": encoded.truncated_chosen,
            "truncated_rejected": encoded.truncated_rejected,
            "truncated_others": found.truncated_others,
        }


@dataclass(frozen=True, slots=True)
class Part:
    """A file of candidates in the order of their prompts' hashes."""

    file: str
    bytes: int
    lowest: int
    highest: int
    """Of its hashes."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How the candidates are divided."""

    home: str
    parts: Sequence[Part]
    line_offsets: npt.NDArray[np.int64]
    """By block: what is added to its line numbers to give those in the whole file."""
    count: int

    def read(self, bucket: int) -> pa.Table:
        """All candidates of one range of hashes, with their line numbers in whole files."""
        # A hash is below 2**64, and so are the bounds but for the last, which no hash reaches.
        low, high = (bound * HASHES // self.count for bound in (bucket, bucket + 1))
        tables = [OUTCOME_SCHEMA.empty_table()]
        for part in self.parts:
            if part.highest < low or part.lowest >= high:
                continue
            file = mirror(self.home).fetch(part.file, size=part.bytes)
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            hashes = table["prompt_hash"].combine_chunks().to_numpy()
            start = int(np.searchsorted(hashes, np.uint64(low)))
            stop = len(hashes) if high == HASHES else int(np.searchsorted(hashes, np.uint64(high)))
            if start < stop:
                rows = table.slice(start, stop - start)
                # Small pieces of many mapped files would hold pages all around them; so they are copied.
                tables.append(rows.take(np.arange(len(rows))) if rows.nbytes < COPIED_BYTES else rows)
        whole = pa.concat_tables(tables)
        lines = whole["line"].to_numpy() + self.line_offsets[whole["block"].to_numpy()]
        return whole.set_column(whole.column_names.index("line"), "line", pa.array(lines, pa.int64()))


class MeasureBucket:
    """Buckets to the keys of the pairs that could be used: what limits are made of."""

    def __init__(self, buckets: Buckets, seed: int) -> None:
        self._buckets, self._seed = buckets, seed

    def __call__(self, numbers: pa.Table) -> pa.Table:
        used = []
        for number in numbers["bucket"].to_pylist():
            table = self._buckets.read(number).select(NARROW)
            reasons = decide(table, seed=self._seed).reasons
            used.append(table.filter(pa.array([reason is None for reason in reasons], pa.bool_())))
        table = pa.concat_tables(used)
        found = pa.array(keys(table["pair_id"].to_pylist(), self._seed), pa.uint64())
        return pa.table({"split": table["split"], "dataset": table["dataset"], "key": found})


class FinishBucket:
    """Buckets to shards of pairs, rejections and a profile, which it names and describes in one row each."""

    def __init__(self, buckets: Buckets, recipe: Recipe, limits: Sequence[Limit], labels: Sequence[str]) -> None:
        self._buckets, self._recipe, self._limits, self._labels = buckets, recipe, limits, labels

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables([self._finish(number) for number in numbers["bucket"].to_pylist()])

    def _finish(self, number: int) -> pa.Table:
        recipe, section = self._recipe, self._recipe.section
        table = self._buckets.read(number)
        decided = decide(table.select(NARROW), seed=recipe.seed, limits=self._limits)
        for name, values in (("reason", decided.reasons), ("detail", decided.details)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        folder = local_copy(recipe.home)
        folder.mkdir(parents=True, exist_ok=True)
        shards = self._write_shards(number, table, folder)
        rejections = f"{WORK}/rejections-{number:06d}.jsonl"
        _write_rejections(table, decided.order, folder / rejections, redact=section.redact)
        mirror(recipe.home).publish(rejections, *(shard.file for shard in shards.values()))
        found = profile(
            table, sources=self._labels, examples=section.report_examples, redact=section.redact, seed=recipe.seed
        )
        described = {split: dataclasses.asdict(shard) for split, shard in shards.items()}
        return pa.table(
            {
                "bucket": [number],
                "shards": [json.dumps(described)],
                "rejections": [rejections],
                "profile": [found.to_json()],
            }
        )

    def _write_shards(self, number: int, table: pa.Table, folder: Path) -> dict[str, Shard]:
        """The pairs that are used, by split, in the order of their ids."""
        ids, splits = table["pair_id"].to_pylist(), table["split"].to_pylist()
        used = pc.is_null(table["reason"]).to_pylist()
        pairs = table.select(PAIR_SCHEMA.names)
        shards: dict[str, Shard] = {}
        for split in SPLITS:
            rows = sorted((i for i, name in enumerate(splits) if used[i] and name == split), key=lambda i: ids[i])
            if rows or number == 0:  # so that every split has a shard
                pieces = (pairs.take(rows[i : i + ROWS_AT_ONCE]) for i in range(0, len(rows), ROWS_AT_ONCE))
                shards[split] = write_shard_of(pieces, PAIR_SCHEMA, folder / shard_name(split, number))
        return shards


def num_buckets(total_bytes: int) -> int:
    """Buckets of about BUCKET_BYTES; how many there are depends on the data alone."""
    return min(max(1, -(-total_bytes // BUCKET_BYTES)), MOST_BUCKETS)


def _answers_hash(pair: PreferencePair) -> int:
    """Of both answers, whichever is preferred."""
    return hash64(json.dumps(sorted([m.content, m.extra] for m in (pair.chosen, pair.rejected))))


def _text_size(candidate: PreferencePair | Rejection) -> int:
    """Characters that tokenising it takes."""
    if isinstance(candidate, Rejection):
        return 0
    return sum(len(message.content) for message in (*candidate.prompt, *candidate.answers))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables put together to about PART_BYTES."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size >= PART_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _write_part(table: pa.Table, path: Path) -> dict[str, int]:
    """Writes a part as one record batch in the order of the prompts' hashes; the file is whole or absent."""
    ordered = table.take(pc.sort_indices(table["prompt_hash"])).combine_chunks()
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, ordered.schema) as writer:
            writer.write_table(ordered)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    hashes = ordered["prompt_hash"]
    return {
        "rows": len(ordered),
        "bytes": path.stat().st_size,
        "lowest": hashes[0].as_py(),
        "highest": hashes[len(ordered) - 1].as_py(),
    }


def _write_rejections(table: pa.Table, order: Sequence[int], path: Path, *, redact: bool) -> None:
    """One JSON line per rejected candidate, in the order of the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["dataset", "source", "line", "candidate", "reason", *([] if redact else ["detail"])]
    narrow = table.select(names)
    rejected = pc.is_valid(table["reason"]).to_pylist()
    rows = [index for index in order if rejected[index]]
    with path.open("w", encoding="utf-8") as stream:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = narrow.take(rows[start : start + ROWS_AT_ONCE]).to_pylist()
            stream.writelines(json.dumps(row) + "\n" for row in some)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of OUTCOME_SCHEMA; token ids column by column, which is several times faster than value by value."""
    columns = []
    for field in OUTCOME_SCHEMA:
        values = [row.get(field.name) for row in rows]
        columns.append(_ids(values) if field.type == pa.list_(pa.int32()) else values)
    return pa.Table.from_arrays(
        [column if isinstance(column, pa.Array) else pa.array(column, field.type) for column, field in
         zip(columns, OUTCOME_SCHEMA, strict=True)],
        schema=OUTCOME_SCHEMA,
    )  # fmt: skip


def _ids(values: Sequence[Any]) -> pa.Array:
    sizes = np.fromiter((0 if v is None else len(v) for v in values), np.int32, len(values))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    present = [v for v in values if v is not None]
    flat = np.concatenate(present).astype(np.int32, copy=False) if present else np.empty(0, np.int32)
    missing = pa.array([v is None for v in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, pa.int32()), mask=missing)
