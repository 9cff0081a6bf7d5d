"""What an evaluation asks of its models: log-probs of held-out pairs, and answers to held-out prompts.

Each model is loaded once per worker and asked everything at once. What it said is kept beside the output until that is
complete, table by table as it comes, so that an evaluation that was cut short does not ask again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, mirror
from dpo_train.config import ModelConfig, RunConfig
from dpo_train.data.folder import model_folder
from dpo_train.data.shards import lengths
from dpo_train.data.tokens import load_tokenizer
from dpo_train.progress import Reporter
from dpo_train.stages.common import device_type, storage_options
from dpo_train.stages.executor import Executor, TableFunction
from dpo_train.stages.score_reference import unit_pairs
from dpo_train.stages.with_model import load_model, map_with_model, most

if TYPE_CHECKING:
    from dpo_train.train.ranks import Ranks

WORK = "work"
"""Scratch folder of the stage."""
CHAMPION = f"{WORK}/champion"
"""The champion's model folder, where all workers can reach it."""

_KEYS = ("pair_id", "temperature", "index")
"""What questions and their results have in common, row by row; questions for scores have the first alone."""
SCORE_COLUMNS = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One of the models of an evaluation."""

    name: str
    """"policy", "reference" or "champion"."""
    model: ModelConfig
    weights: Artifact | None = None
    """Output of a training, where it is not the model as it lies in its folder."""
    frozen_base: bool = False
    """See ``load_policy``."""
    home: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    """Where the model's folder is a part of an output: that output, and the folder's files with their sizes."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer in the data, where the model reads the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What a model said: SCORES_SCHEMA of the pairs, ANSWERS_SCHEMA of the prompts; in any order."""

    scores: pa.Table | None
    answers: pa.Table | None


def ask(
    config: RunConfig,
    asked: Asked,
    out: Output,
    executor: Executor,
    reporter: Reporter,
    *,
    pairs: Sequence[pa.Table] = (),
    prompts: Sequence[pa.Table] = (),
) -> Replies:
    """Scores tables of pairs (SCORE_COLUMNS) and answers tables of prompts (PROMPTS_SCHEMA).

    The policy's own answers come with their log-probs under it, from which the KL is estimated (AskedModel).
    """
    folder = out.path / WORK
    kept = {name: folder / f"{asked.name}-{name}.parquet" for name in ("scores", "answers")}
    wanted = {"scores": list(pairs), "answers": list(prompts)}
    missing = {name: tables for name, tables in wanted.items() if tables and not kept[name].is_file()}
    if missing:
        found = _asked(config, asked, out, executor, reporter, missing)
        for name in missing:
            _write(found[name], kept[name])
        shutil.rmtree(_parts(out, asked), ignore_errors=True)
    return Replies(**{name: pq.read_table(kept[name]) if tables else None for name, tables in wanted.items()})


def shared_copy(folder: Path, out: Output) -> dict[str, int]:
    """The champion's folder, which lies on this machine, as a part of the output; its files there with their sizes."""
    target = out.path / CHAMPION
    if not target.is_dir():
        temporary = target.with_name("champion.part")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder, temporary, copy_function=_link)
        temporary.replace(target)
    files = {file.relative_to(out.path).as_posix(): file.stat().st_size for file in target.rglob("*") if file.is_file()}
    mirror(out.home).publish(*files)
    return files


def _link(source: str, target: str) -> None:
    """A model need not lie on one disk twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _write(table: pa.Table, path: Path) -> None:
    """Whole or absent."""
    # Trials of a sweep that run side by side may both ask the reference.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as stream:
        pq.write_table(table, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _asked(
    config: RunConfig,
    asked: Asked,
    out: Output,
    executor: Executor,
    reporter: Reporter,
    questions: dict[str, list[pa.Table]],
) -> dict[str, pa.Table]:
    build = functools.partial(_build, config, asked)
    reporter.message(f"asking the {asked.name}")
    found: dict[str, list[pa.Table]] = {"scores": [], "answers": []}
    before = 0
    if not config.compute.score_sharded:  # ranks keep their results themselves
        for name, tasks in questions.items():
            paths = [_part(config, out, asked, task) for task in tasks]
            found[name] = [pq.read_table(path) for path in paths if path.is_file()]
            questions[name] = [task for task, path in zip(tasks, paths, strict=True) if not path.is_file()]
        before = sum(len(table) for tables in found.values() for table in tables)
        # One pool of workers for both, so that each loads the model once. Ranks must all do the same at a time.
        questions = {" and ".join(questions): [task for tasks in questions.values() for task in tasks]}
    for unit, tasks in questions.items():
        for table in map_with_model(
            config,
            build,
            tasks,
            out,
            executor,
            reporter,
            name=asked.name,
            sizes=list(map(len, tasks)),
            before=before,
            unit={"scores": "pairs"}.get(unit, unit),
        ):
            found["answers" if "answer" in table.column_names else "scores"].append(table)
            if not config.compute.score_sharded:
                _write(table, _part(config, out, asked, table))
    return {name: pa.concat_tables(tables) for name, tables in found.items() if tables}


def _parts(out: Output, asked: Asked) -> Path:
    return out.path / WORK / f"{asked.name}-parts"


def _part(config: RunConfig, out: Output, asked: Asked, table: pa.Table) -> Path:
    """Where the result of one table of questions is kept, under a name that it shares with the questions. What changes
    an answer's noise or the rounding of its log-probs is part of it."""
    keys = table.select([name for name in _KEYS if name in table.column_names]).to_pydict()
    content = repr((keys, device_type(config), config.evaluate.row_tokens))
    return _parts(out, asked) / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"


def pair_tables(pairs: pa.Table) -> list[pa.Table]:
    """Longest first: rows of similar length fill better, and the last task is a short one."""
    ordered = pairs.take(pa.array(np.argsort(-lengths(pairs), kind="stable")))
    return _slices(ordered, unit_pairs(len(ordered)))


def _slices(table: pa.Table, size: int) -> list[pa.Table]:
    return [table.slice(start, size) for start in range(0, len(table), size)]


def _build(config: RunConfig, asked: Asked, ranks: Ranks | None) -> TableFunction:
    """Builds what answers in its worker; torch is imported there and not here."""
    from dpo_train.evaluate.asked_model import AskedModel

    storage.use(storage_options(config))
    if asked.files:
        mirror(asked.home).fetch_all(asked.files)
    weights = None if asked.weights is None else str(asked.weights.path)
    policy = load_model(config, asked.model, ranks, weights=weights, frozen_base=asked.frozen_base)
    return AskedModel(
        policy,
        load_tokenizer(model_folder(asked.model.path), trust_remote_code=asked.model.trust_remote_code),
        row_tokens=config.evaluate.row_tokens,
        max_tokens=config.evaluate.max_sample_tokens,
        seed=config.seed,
        batch=config.evaluate.sample_batch,
        end_ids=asked.end_ids,
        scores_answers=asked.name == "policy",
        continues=config.prepare.template == "plain",
        most=most(ranks),
    )


def prompt_tables(
    pair_ids: Sequence[str], prompt_ids: Any, temperatures: Sequence[float], *, size: int, count: int = 1
) -> list[pa.Table]:
    """PROMPTS_SCHEMA: prompts at every temperature, ``count`` times at the first; ``size`` in a table, longest first.

    A table is of one temperature.
    """
    found = []
    for place, temperature in enumerate(temperatures):
        tables = [
            pa.table(
                {
                    "pair_id": pa.array(pair_ids, pa.string()),
                    "prompt_ids": prompt_ids,
                    "temperature": pa.array([temperature] * len(pair_ids), pa.float64()),
                    "index": pa.array([index] * len(pair_ids), pa.int32()),
                }
            )
            for index in range(count if place == 0 else 1)
        ]
        prompts = pa.concat_tables(tables)
        found += _slices(prompts.take(pa.array(np.argsort(-lengths(prompts, "prompt"), kind="stable"))), size)
    return found
