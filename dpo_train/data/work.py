"""The two halves of preparing data, each a function that a worker applies to one piece at a time.

    block of raw records --PrepareBlock--> parts: candidates in the order of their prompts' hashes    (work/*.arrow)
    all parts            --FinishBucket--> of one range of hashes: shards of pairs, rejections, a profile

What is large goes from file to file; only names and numbers pass through the driver. A part is written whenever so many
bytes have come together and a bucket is a range of hashes chosen by size, so memory does not grow with the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.artifacts import local_copy, mirror
from dpo_train.config import PrepareConfig
from dpo_train.data.formats import candidates
from dpo_train.data.ngrams import Overlap
from dpo_train.data.pairs import OUTCOME_SCHEMA, PAIR_SCHEMA, SPLITS, PreferencePair, Rejection
from dpo_train.data.profile import profile
from dpo_train.data.rankings import Encoded, encode_all
from dpo_train.data.select import Limit, decide, hash64, keys, split_of
from dpo_train.data.shards import Shard, shard_name, write_shard
from dpo_train.data.sources import Block, BlockReader, Record
from dpo_train.data.tokens import PairTokenizer

WORK = "work"
RECORDS_AT_ONCE = 512
PART_BYTES = 32 << 20
BUCKET_BYTES = 48 << 20
"""Of candidates, texts and token ids: what a worker then holds is some four times as much."""

HASHES = 1 << 64

PARTS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("lines", pa.int64()),
        ("read_bytes", pa.int64()),
    ]
)
"""What PrepareBlock says of a block: a row per part. ``lines`` and ``read_bytes`` are the block's, on its first row."""


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
        rows: list[dict[str, Any]] = []
        for fields in blocks.to_pylist():
            number = fields.pop("block")
            rows += self._prepare(number, Block(**fields))
        return pa.Table.from_pylist(rows, schema=PARTS_SCHEMA)

    def _prepare(self, number: int, block: Block) -> list[dict[str, Any]]:
        reader = BlockReader(block)
        folder = local_copy(self._recipe.home) / WORK
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[dict[str, Any]] = []
        for table in _gathered(self._tables(block, reader)):
            name = f"{WORK}/block-{number:06d}-{len(parts):04d}.arrow"
            size = _write_part(table, folder.parent / name)
            mirror(self._recipe.home).publish(name)
            parts.append({"file": name, "rows": len(table), "bytes": size, "lines": 0, "read_bytes": 0})
        parts = parts or [{"file": "", "rows": 0, "bytes": 0}]
        parts[0] |= {"lines": reader.lines, "read_bytes": block.size_bytes}
        return [{"block": number, **part} for part in parts]

    def _tables(self, block: Block, reader: BlockReader) -> Iterator[pa.Table]:
        records = iter(reader)
        while some := list(itertools.islice(records, RECORDS_AT_ONCE)):
            yield self._outcomes(block, some)

    def _outcomes(self, block: Block, records: Sequence[Record]) -> pa.Table:
        """Candidates of some records as rows; every record gives at least one."""
        source, form = self._sources[block.dataset], self._recipe.formats[block.dataset]
        found = [(record.line, candidates(record.value, source, form)) for record in records]
        pairs = [pair for _, made in found for pair in made if isinstance(pair, PreferencePair)]
        encoded = iter(self._encode(pairs))
        rows = []
        for line, made in found:
            prompt = next((pair.prompt_key for pair in made if isinstance(pair, PreferencePair)), None)
            # All candidates of a record go into one bucket, where it is counted as used or rejected.
            hashed = hash64(prompt if prompt is not None else f"{block.name}\0{block.start}\0{line}")
            place = {"dataset": block.dataset, "source": block.name, "line": line, "prompt_hash": hashed}
            fields: list[dict[str, Any]] = []
            dropped: list[Rejection] = []
            for candidate in made:
                if isinstance(candidate, Rejection):
                    fields.append(dataclasses.asdict(candidate))
                else:
                    tokens = next(encoded)
                    fields.append(self._row(tokens, source.split))
                    dropped += tokens.dropped
            fields += map(dataclasses.asdict, dropped)
            rows += [place | {"candidate": index} | own for index, own in enumerate(fields)]
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
            "pair_id": pair.pair_id,
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
    """A file of candidates in the order of their prompts' hashes. ``offset`` is added to its line numbers."""

    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How the candidates are divided."""

    home: str
    parts: Sequence[Part]
    count: int

    def read(self, bucket: int) -> pa.Table:
        """All candidates of one range of hashes, with their line numbers in whole files."""
        # A hash is below 2**64, and so are the bounds but for the last, which no hash reaches.
        low, high = (bound * HASHES // self.count for bound in (bucket, bucket + 1))
        tables = []
        for part in self.parts:
            file = mirror(self.home).fetch(part.file)
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            hashes = table["prompt_hash"].combine_chunks().to_numpy() if len(table) else np.empty(0, np.uint64)
            start = int(np.searchsorted(hashes, np.uint64(low)))
            stop = len(hashes) if high == HASHES else int(np.searchsorted(hashes, np.uint64(high)))
            rows = table.slice(start, stop - start)
            if part.offset:
                lines = pc.add(rows["line"], part.offset)
                rows = rows.set_column(rows.column_names.index("line"), "line", lines)
            tables.append(rows)
        return pa.concat_tables(tables) if tables else OUTCOME_SCHEMA.empty_table()


class MeasureBucket:
    """Buckets to the keys of the pairs that could be used: what limits are made of."""

    def __init__(self, buckets: Buckets, seed: int) -> None:
        self._buckets, self._seed = buckets, seed

    def __call__(self, numbers: pa.Table) -> pa.Table:
        used = [_used(decide(self._buckets.read(n), seed=self._seed)) for n in numbers["bucket"].to_pylist()]
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
        table = decide(self._buckets.read(number), seed=recipe.seed, limits=self._limits)
        folder = local_copy(recipe.home)
        folder.mkdir(parents=True, exist_ok=True)
        used = _used(table)
        shards: dict[str, Shard] = {}
        for split in SPLITS:
            pairs = used.filter(pc.equal(used["split"], split)).select(PAIR_SCHEMA.names).sort_by("pair_id")
            if len(pairs) or number == 0:  # so that every split has a shard
                shards[split] = write_shard(pairs, folder / shard_name(split, number))
        rejections = f"{WORK}/rejections-{number:06d}.jsonl"
        _write_rejections(table, folder / rejections, redact=section.redact)
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


def num_buckets(total_bytes: int) -> int:
    """Buckets of about BUCKET_BYTES; how many there are depends on the data alone."""
    return max(1, -(-total_bytes // BUCKET_BYTES))


def _used(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["reason"]))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables put together to about PART_BYTES."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(t.nbytes for t in waiting) >= PART_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write_part(table: pa.Table, path: Path) -> int:
    """Writes a part as one record batch in the order of the prompts' hashes; returns its bytes."""
    ordered = table.take(pc.sort_indices(table["prompt_hash"])).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ordered.schema) as writer:
        writer.write_table(ordered)
    return path.stat().st_size


def _write_rejections(table: pa.Table, path: Path, *, redact: bool) -> None:
    """One JSON line per rejected candidate, in the order of the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rejected = table.filter(pc.is_valid(table["reason"]))
    names = ["dataset", "source", "line", "candidate", "reason", *([] if redact else ["detail"])]
    with path.open("w", encoding="utf-8") as stream:
        for batch in rejected.select(names).to_batches(max_chunksize=RECORDS_AT_ONCE):
            stream.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


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
