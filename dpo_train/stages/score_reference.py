"""pairs -> pairs with the reference's per-token log-probs"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.data.pairs import SCORED_SCHEMA, SPLITS, token_pairs
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_model_reads, check_rows
from dpo_train.stages.common import compute_dtype, make, model_digest
from dpo_train.stages.executor import Executor, TableFunction

TASK_PAIRS = 16
"""Pairs of one unit of work: small enough for a moving progress bar, large enough to fill rows (88 % at 512 tokens)."""


def score_reference(config: RunConfig, pairs: Artifact, executor: Executor, *, output: Path | None = None) -> Artifact:
    """Makes ``train.parquet``, ``validation.parquet``, ``heldout.parquet`` in SCORED_SCHEMA.

    The identity covers the pairs (hence tokenizer, template and truncation), the weights, the layout of rows and the
    dtype of the computation: every beta, epoch and retry reads the same scores, and a stale one is never read.
    """
    content = {**to_dict(config.score), "compute_dtype": compute_dtype(config)}
    inputs = {"pairs": pairs.record.digest, "model": model_digest(config)}

    def body(out: Output) -> Summary:
        tables = {split: pq.read_table(pairs.path / f"{split}.parquet") for split in SPLITS}
        everything = pa.concat_tables(tables.values())
        check_model_reads(everything, model_folder(config.model.path))
        check_rows(everything, config.score.row_tokens, "score.row_tokens")
        scorer = functools.partial(score_table_of, config, None, config.score.row_tokens)
        scores = score_table(everything, scorer, executor, Reporter.from_environment("score_reference"))
        for split, table in tables.items():
            scored = join_scores(table, scores, prefix="reference_")
            pq.write_table(scored.select(SCORED_SCHEMA.names).cast(SCORED_SCHEMA), out.path / f"{split}.parquet")
        return Summary(counts={"pairs": len(everything), "tokens": count_tokens(everything)})

    return make(config, "score_reference", content, inputs, body, output=output)


def score_table_of(config: RunConfig, weights: str | None, row_tokens: int) -> TableFunction:
    """Builds the scorer in its worker; torch is imported there and not here."""
    from dpo_train.model.score_table import ScoreTable

    frozen_base = config.train.lora is not None
    return ScoreTable(config.model, config.compute.device, weights, row_tokens, frozen_base)


def score_table(
    table: pa.Table, make_scorer: Callable[[], TableFunction], executor: Executor, reporter: Reporter
) -> pa.Table:
    """Per-token log-probs of all pairs of a table, in any order (SCORES_SCHEMA)."""
    wanted = table.select(["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    # Of similar length together: rows fill better, and the last task is a short one.
    lengths = [pair.num_tokens for pair in token_pairs(wanted)]
    wanted = wanted.take(pa.array(sorted(range(len(lengths)), key=lambda i: -lengths[i]), pa.int64()))
    tasks = [wanted.slice(start, TASK_PAIRS) for start in range(0, len(wanted), TASK_PAIRS)]
    reporter.progress(0, len(wanted))
    return pa.concat_tables(_counted(executor.map_tables(make_scorer, tasks, uses_model=True), len(wanted), reporter))


def join_scores(pairs: pa.Table, scores: pa.Table, *, prefix: str) -> pa.Table:
    """The pairs, in their order, with their scores as two more columns."""
    place = {pair_id: index for index, pair_id in enumerate(scores["pair_id"].to_pylist())}
    rows = scores.take(pa.array([place[pair_id] for pair_id in pairs["pair_id"].to_pylist()], pa.int64()))
    for name in ("chosen_logps", "rejected_logps"):
        pairs = pairs.append_column(prefix + name, rows[name])
    return pairs


def count_tokens(table: pa.Table) -> int:
    """Tokens in packed rows, each prompt once."""
    return sum(pair.num_tokens for pair in token_pairs(table))


def _counted(tables: Iterable[pa.Table], total: int, reporter: Reporter) -> Iterable[pa.Table]:
    done = 0
    for table in tables:
        done += len(table)
        reporter.progress(done, total)
        yield table
