"""pairs -> pairs with the reference's per-token log-probs

    shards of pairs --tasks--> units: scores of some pairs, one file each (units/*.parquet)
    shard + its units + what earlier outputs know --join--> shard of scored pairs

A unit is done or not there: killed in the middle, only unfinished units are done again. Scores belong to a reference,
whose digest says all that they depend on; pairs that another output with the same reference holds are not scored again,
so appended data cost what is new.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, identity, mirror
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.data.known import KnownScores
from dpo_train.data.pairs import SCORE_NAMES, SCORED_SCHEMA, SPLITS
from dpo_train.data.shards import SHARDS_FILE, TOKENS, Shard, Split, lengths, manifest, read_shard, write_shard
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_model_reads, check_rows
from dpo_train.stages.common import compute_dtype, make, model_digest, storage_options
from dpo_train.stages.executor import Executor, TableFunction

if TYPE_CHECKING:
    from dpo_train.model.score_table import ScoreTable

UNITS = "units"
FEWEST_PAIRS, MOST_PAIRS = 16, 1024
"""Pairs of one unit of work: small enough for a moving progress bar, large enough to fill rows (88 % of 512 tokens at
16 pairs)."""
WANTED_UNITS = 1000


def score_reference(
    config: RunConfig, pairs: Artifact, executor: Executor, *, output: Path | str | None = None
) -> Artifact:
    """Makes the shards of each split in SCORED_SCHEMA.

    The identity covers the pairs (hence tokenizer, template and truncation), the weights, the layout of rows and the
    dtype of the computation: every beta, epoch and retry reads the same scores, and a stale one is never read.
    """
    content = {**to_dict(config.score), "compute_dtype": compute_dtype(config)}
    inputs = {"pairs": pairs.record.digest, "model": model_digest(config)}
    reference = reference_digest(config, pairs, inputs["model"])

    def body(out: Output) -> Summary:
        splits = [Split(pairs, split) for split in SPLITS]
        reporter = Reporter.from_environment("score_reference")
        num_tokens = _check(config, splits)
        known = KnownScores.find(config.store, reference, leave_out=out.home)
        work = _Work(config, out, pairs, known)
        work.score([(split, shard) for split in splits for shard in split.shards], executor, reporter)
        scored = {split.name: [work.join(shard, split) for shard in split.shards] for split in splits}
        out.write_json(SHARDS_FILE, manifest(scored))
        num_pairs = sum(split.num_pairs for split in splits)
        return Summary(
            counts={"pairs": num_pairs, "tokens": num_tokens, "newly_scored": work.num_scored},
            details={"reference": reference},
        )

    artifact = make(config, "score_reference", content, inputs, body, output=output, resumable=True, scratch=(UNITS,))
    # Only now: killed before its record was written, nothing must be scored again.
    if not (artifact.reused and storage.is_remote(artifact.home)):
        discard(artifact.home, UNITS)
    return artifact


def reference_digest(config: RunConfig, pairs: Artifact, model: str) -> str:
    """What a score depends on besides its pair: weights, tokenizer, template, truncation, dtype, layout and code."""
    prepared = pairs.record.config
    names = ("template", "chat_template", "template_options", "max_prompt_tokens", "max_answer_tokens",
             "prompt_truncation", "answer_truncation")  # fmt: skip
    content = {
        "tokens": {name: prepared.get(name) for name in names},
        "score": to_dict(config.score),
        "compute_dtype": compute_dtype(config),
    }
    return identity("reference", content, {"model": model, "tokenizer": pairs.record.inputs.get("tokenizer", "")})


class _Work:
    """The scoring of one output: which units there are, and what becomes of them."""

    def __init__(self, config: RunConfig, out: Output, pairs: Artifact, known: KnownScores) -> None:
        self._config, self._out, self._pairs, self._known = config, out, pairs, known
        self._units: dict[str, list[str]] = {}
        self.num_scored = 0

    def score(self, shards: Sequence[tuple[Split, Shard]], executor: Executor, reporter: Reporter) -> None:
        """Every unit that is not there yet."""
        total = sum(shard.rows for _, shard in shards)
        tasks: list[pa.Table] = []
        done = 0
        for split, shard in shards:
            units, known = self._plan(split, shard, unit_pairs(total))
            self._units[shard.file] = [name for name, _ in units]
            missing = [(name, rows) for name, rows in units if not self._is_there(name)]
            tasks += [_task(shard, name, rows) for name, rows in missing]
            done += known + sum(len(rows) for _, rows in units) - sum(len(rows) for _, rows in missing)
        if done:
            reporter.message(f"{done} of {total} pairs are scored already")
        reporter.progress(done, total)
        if not tasks:
            return
        build = functools.partial(_build_scorer, self._config, self._pairs, self._out.home)
        for table in executor.map_tables(build, tasks, uses_model=True):
            self.num_scored += sum(table["pairs"].to_pylist())
            reporter.progress(done + self.num_scored, total)

    def join(self, shard: Shard, split: Split) -> Shard:
        """The shard with its scores; once made it is not made again."""
        path = self._out.path / shard.file
        table = read_shard(split.path(shard))
        ids = table["pair_id"].to_pylist()
        units = [read_shard(mirror(self._out.home).fetch(unit)) for unit in self._units[shard.file]]
        scored = {pair_id for unit in units for pair_id in unit["pair_id"].to_pylist()}
        scores = pa.concat_tables([*units, self._known.scores([i for i in ids if i not in scored])])
        joined = join_scores(table, scores, prefix="reference_")
        return write_shard(joined.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA), path)

    def _plan(self, split: Split, shard: Shard, size: int) -> tuple[list[tuple[str, list[int]]], int]:
        """Units of a shard as (name, rows), and how many of its pairs are known. A name is its pairs' digest."""
        table = read_shard(split.path(shard), TOKENS)
        missing = np.flatnonzero(~self._known.has(table["pair_id"]))
        # Of similar length together: rows fill better, and the last task is a short one.
        ordered = missing[np.argsort(-lengths(table)[missing], kind="stable")]
        ids = table["pair_id"].to_pylist()
        units = []
        for start in range(0, len(ordered), size):
            rows = ordered[start : start + size].tolist()
            digest = hashlib.sha256("".join(ids[row] for row in rows).encode()).hexdigest()[:16]
            units.append((f"{UNITS}/{digest}.parquet", rows))
        return units, shard.rows - len(missing)

    def _is_there(self, unit: str) -> bool:
        return (self._out.path / unit).is_file()


def unit_pairs(total: int) -> int:
    """Pairs of a unit: as many as give about WANTED_UNITS, within bounds."""
    return min(MOST_PAIRS, max(FEWEST_PAIRS, total // WANTED_UNITS))


def _task(shard: Shard, name: str, rows: list[int]) -> pa.Table:
    return pa.table({"shard": [shard.file], "unit": [name], "rows": [rows]})


def _check(config: RunConfig, splits: Sequence[Split]) -> int:
    """What can be seen before a model is loaded; returns the number of tokens in packed rows."""
    total, model = 0, model_folder(config.model.path)
    for split in splits:
        for table in split.tables(TOKENS):
            check_model_reads(table, model)
            check_rows(table, config.score.row_tokens, "score.row_tokens")
            total += int(lengths(table).sum())
    return total


def _build_scorer(config: RunConfig, pairs: Artifact, home: str) -> TableFunction:
    """Builds the scorer in its worker; torch is imported there and not here."""
    from dpo_train.model.score_units import ScoreUnits

    storage.use(storage_options(config))
    return ScoreUnits(_scorer(config, None, config.score.row_tokens), pairs, home)


def score_table_of(config: RunConfig, weights: str | None, row_tokens: int) -> TableFunction:
    """The same for whole tables under other weights, as the evaluation wants it."""
    storage.use(storage_options(config))
    return _scorer(config, weights, row_tokens)


def _scorer(config: RunConfig, weights: str | None, row_tokens: int) -> ScoreTable:
    from dpo_train.model.score_table import ScoreTable

    frozen_base = config.train.lora is not None
    return ScoreTable(config.model, config.compute.device, weights, row_tokens, frozen_base)


def score_table(
    table: pa.Table, make_scorer: Callable[[], TableFunction], executor: Executor, reporter: Reporter
) -> pa.Table:
    """Per-token log-probs of all pairs of a table, in any order (SCORES_SCHEMA)."""
    wanted = table.select(["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    wanted = wanted.take(pa.array(np.argsort(-lengths(wanted), kind="stable")))
    size = unit_pairs(len(wanted))
    tasks = [wanted.slice(start, size) for start in range(0, len(wanted), size)]
    reporter.progress(0, len(wanted))
    return pa.concat_tables(_counted(executor.map_tables(make_scorer, tasks, uses_model=True), len(wanted), reporter))


def join_scores(pairs: pa.Table, scores: pa.Table, *, prefix: str) -> pa.Table:
    """The pairs, in their order, with their scores as more columns."""
    place = {pair_id: index for index, pair_id in enumerate(scores["pair_id"].to_pylist())}
    rows = scores.take(pa.array([place[pair_id] for pair_id in pairs["pair_id"].to_pylist()], pa.int64()))
    for name in SCORE_NAMES:
        pairs = pairs.append_column(prefix + name, rows[name])
    return pairs


def _counted(tables: Iterable[pa.Table], total: int, reporter: Reporter) -> Iterable[pa.Table]:
    done = 0
    for table in tables:
        done += len(table)
        reporter.progress(done, total)
        yield table
