"""pairs -> pairs with the reference's per-token log-probs

    shards of pairs --tasks--> units: scores of some pairs, one file each (units/*.parquet)
    shard + its units + what earlier outputs know --join--> shard of scored pairs; all keys (keys.parquet)

A unit is done or not there: killed in the middle, only what no unit holds is done again. Scores belong to a reference,
whose digest says all that they depend on besides the tokens; tokens that another output with the same reference holds
are not scored again, so appended data cost what is new.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, mirror
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.data.known import KEYS_FILE, KEYS_SCHEMA, Keys, KnownScores, token_keys
from dpo_train.data.pairs import SCORE_NAMES, SCORED_SCHEMA, SPLITS
from dpo_train.data.shards import SHARDS_FILE, TOKENS, Shard, Split, lengths, manifest, read_shard, write_shard
from dpo_train.identity import identity
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_model_reads, check_rows
from dpo_train.stages.common import check_adapter, compute_dtype, make, model_digest
from dpo_train.stages.executor import Executor, TableFunction
from dpo_train.stages.with_model import PARTS, Build, load_model, map_with_model, most

if TYPE_CHECKING:
    from dpo_train.train.ranks import Ranks

UNITS = "units"
FEWEST_PAIRS, MOST_PAIRS = 16, 1024
"""Pairs of one unit of work: small enough for a moving progress bar, large enough to fill rows (88 % of 512 tokens at
16 pairs)."""
WANTED_UNITS = 1000

_Rows = npt.NDArray[np.int64]


def score_reference(
    config: RunConfig, pairs: Artifact, executor: Executor, *, output: Path | str | None = None
) -> Artifact:
    """Makes the shards of each split in SCORED_SCHEMA.

    The identity covers the pairs (hence tokenizer, template and truncation), the weights, the layout of rows and the
    dtype of the computation: every beta, epoch and retry reads the same scores, and a stale one is never read.
    """
    check_adapter(config)
    content = {**to_dict(config.score), "compute_dtype": compute_dtype(config)}
    inputs = {"pairs": pairs.record.digest, "model": model_digest(config)}
    reference = reference_digest(config, pairs, inputs["model"])

    reporter = Reporter.from_environment("score_reference")

    def body(out: Output) -> Summary:
        parts = _look(config, [Split(pairs, split) for split in SPLITS])
        known = KnownScores(_all_keys(parts))
        known.add_units(out.home, UNITS, tell=reporter.message)
        known.add_outputs(config.store, reference, leave_out=out.home, tell=reporter.message)
        build = functools.partial(_build_scorer, config, pairs, out.home)
        num_scored = _score(config, parts, known, build, out, executor, reporter)
        scored: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        for part in parts:
            scored[part.split.name].append(_join(part, known, out.path / part.shard.file))
        write_shard(_listing(parts), out.path / KEYS_FILE)
        out.write_json(SHARDS_FILE, manifest(scored))
        return Summary(
            counts={
                "pairs": sum(len(part.keys_P) for part in parts),
                "tokens": sum(int(part.lengths_P.sum(dtype=np.int64)) for part in parts),
                "newly_scored": num_scored,
            },
            details={"reference": reference},
        )

    artifact = make(
        config, "score_reference", content, inputs, body, output=output, resumable=True, scratch=(UNITS, PARTS)
    )
    # Only now: killed before its record was written, nothing must be scored again.
    if not (artifact.reused and storage.is_remote(artifact.home)):
        for scratch in (UNITS, PARTS):
            discard(artifact.home, scratch, tell=reporter.message)
    return artifact


def reference_digest(config: RunConfig, pairs: Artifact, model: str) -> str:
    """What a score depends on besides its tokens: weights, tokenizer, template, truncation, dtype, layout and code."""
    prepared = pairs.record.config
    names = ("template", "chat_template", "template_options", "max_prompt_tokens", "max_answer_tokens",
             "prompt_truncation", "answer_truncation")  # fmt: skip
    content = {
        "tokens": {name: prepared.get(name) for name in names},
        "score": to_dict(config.score),
        "compute_dtype": compute_dtype(config),
    }
    return identity("reference", content, {"model": model, "tokenizer": pairs.record.inputs.get("tokenizer", "")})


@dataclass(frozen=True, slots=True)
class _Part:
    """A shard of pairs with what the plan needs to know of it: 12 bytes a pair."""

    split: Split
    shard: Shard
    keys_P: Keys
    lengths_P: npt.NDArray[np.int32]


def _look(config: RunConfig, splits: Sequence[Split]) -> list[_Part]:
    """All shards, after a check of what can be seen before a model is loaded."""
    parts, model = [], model_folder(config.model.path)
    for split in splits:
        for shard, table in zip(split.shards, split.tables(TOKENS), strict=True):
            check_model_reads(table, model)
            check_rows(table, config.score.row_tokens, "score.row_tokens")
            parts.append(_Part(split, shard, token_keys(table), lengths(table).astype(np.int32)))
    return parts


def _score(
    config: RunConfig,
    parts: Sequence[_Part],
    known: KnownScores,
    build: Build,
    out: Output,
    executor: Executor,
    reporter: Reporter,
) -> int:
    """Scores what is not known, after which it is; returns the number of pairs."""
    total = sum(len(part.keys_P) for part in parts)
    units = [(_unit_name(part.keys_P[rows]), part, rows) for part, rows in _plan(parts, known)]
    if found := sum(int(known.has(part.keys_P).sum()) for part in parts):
        reporter.message(f"{found} of {total} pairs are scored already")
    tasks = [_task(part.shard, name, rows) for name, part, rows in units]
    sizes = [len(rows) for _, _, rows in units]
    done = map_with_model(
        config, build, tasks, out, executor, reporter,
        name="reference", sizes=sizes, size_of=lambda unit: int(unit["pairs"][0].as_py()), before=total - sum(sizes),
    )  # fmt: skip
    num_scored: int = sum(unit["pairs"][0].as_py() for unit in done)
    for name, part, rows in units:
        file = functools.partial(mirror(out.home).fetch, name)
        known.add(part.keys_P[rows], np.arange(len(rows), dtype=np.int32), file)
    return num_scored


def _plan(parts: Sequence[_Part], known: KnownScores) -> Iterator[tuple[_Part, _Rows]]:
    """The rows of each unit that is to be done. Of pairs with the same tokens the first is scored."""
    keys = _all_keys(parts)
    is_first = np.zeros(len(keys), np.bool_)
    is_first[np.unique(keys, return_index=True)[1]] = True
    size, end = unit_pairs(len(keys)), 0
    for part in parts:
        start, end = end, end + len(part.keys_P)
        # Of similar length together: rows fill better, and the last task is a short one.
        ordered = np.argsort(-part.lengths_P, kind="stable")
        for rows in unit_rows(ordered[is_first[start:end][ordered]], ~known.has(part.keys_P), size):
            yield part, rows


def _all_keys(parts: Sequence[_Part]) -> Keys:
    return np.concatenate([np.empty(0, np.uint64), *(part.keys_P for part in parts)])


def unit_rows(ordered: _Rows, missing_P: npt.NDArray[np.bool_], size: int) -> list[_Rows]:
    """Rows of units of a size that hold what is missing.

    A unit of which everything is missing is the same whatever else is done, so that an interrupted scoring gives the
    bits of an unbroken one, which hang on what is scored together. What else is missing is put together.
    """
    groups = _cut(ordered, size)
    whole = [rows for rows in groups if missing_P[rows].all()]
    rest = [rows[missing_P[rows]] for rows in groups if not missing_P[rows].all()]
    return [*whole, *_cut(np.concatenate(rest), size)] if rest else whole


def _cut(rows: _Rows, size: int) -> list[_Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _unit_name(keys: Keys) -> str:
    """Of its content, in its order."""
    return f"{UNITS}/{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}.parquet"


def _join(part: _Part, known: KnownScores, path: Path) -> Shard:
    """Writes the shard with its scores, also over one that an interrupted attempt has written."""
    table = read_shard(part.split.path(part.shard))
    scores = known.scores(part.keys_P)
    for name in SCORE_NAMES:
        table = table.append_column(f"reference_{name}", scores[name])
    return write_shard(table.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA), path)


def _listing(parts: Sequence[_Part]) -> pa.Table:
    """The keys of all pairs, for later outputs (KEYS_SCHEMA)."""
    rows = [np.arange(len(part.keys_P), dtype=np.int32) for part in parts]
    files = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in rows])
    names = pa.array([part.shard.file for part in parts], pa.string())
    numbers = np.concatenate([np.empty(0, np.int32), *rows])
    return pa.table([_all_keys(parts), pa.DictionaryArray.from_arrays(files, names), numbers], schema=KEYS_SCHEMA)


def unit_pairs(total: int) -> int:
    """Pairs of a unit: as many as give about WANTED_UNITS, within bounds."""
    return min(MOST_PAIRS, max(FEWEST_PAIRS, total // WANTED_UNITS))


def _task(shard: Shard, name: str, rows: _Rows) -> pa.Table:
    return pa.table({"shard": [shard.file], "unit": [name], "rows": [rows.tolist()]})


def _build_scorer(config: RunConfig, pairs: Artifact, home: str, ranks: Ranks | None) -> TableFunction:
    """Builds the scorer in its worker; torch is imported there and not here."""
    from dpo_train.model.score_table import ScoreTable
    from dpo_train.model.score_units import ScoreUnits

    policy = load_model(config, config.model, ranks, frozen_base=config.train.lora is not None)
    return ScoreUnits(ScoreTable(policy, config.score.row_tokens, most=most(ranks)), pairs, home)


def join_scores(pairs: pa.Table, scores: pa.Table, *, prefix: str) -> pa.Table:
    """The pairs, in their order, with their scores as more columns."""
    place = {pair_id: index for index, pair_id in enumerate(scores["pair_id"].to_pylist())}
    rows = scores.take(pa.array([place[pair_id] for pair_id in pairs["pair_id"].to_pylist()], pa.int64()))
    for name in SCORE_NAMES:
        pairs = pairs.append_column(prefix + name, rows[name])
    return pairs
