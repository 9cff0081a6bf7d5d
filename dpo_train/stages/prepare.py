"""raw data -> validated, tokenised pairs by split, and every rejection with its reason"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import PrepareConfig, RunConfig, to_dict
from dpo_train.data.folder import model_folder, tokenizer_digest
from dpo_train.data.pairs import OUTCOME_SCHEMA, SPLITS, PreferencePair, Rejection
from dpo_train.data.select import counts, select_pairs, split_of
from dpo_train.data.sources import Block, data_digest, list_files, plan_blocks, read_block
from dpo_train.data.tokens import PairTokenizer, load_tokenizer
from dpo_train.data.validate import validate
from dpo_train.errors import DataError
from dpo_train.progress import Reporter
from dpo_train.stages.common import make
from dpo_train.stages.executor import Executor

REJECTIONS_FILE = "rejections.jsonl"


def prepare(config: RunConfig, executor: Executor, *, output: Path | None = None) -> Artifact:
    """Makes ``train.parquet``, ``validation.parquet``, ``heldout.parquet`` (PAIR_SCHEMA) and ``rejections.jsonl``.

    Raises:
        DataError: the data cannot be read, or no training pair is left.
        ModelError: the tokenizer cannot be loaded or has no chat template.
    """
    section = config.prepare
    data = Path(section.path)
    files = list_files(data)
    content = {key: value for key, value in to_dict(section).items() if key != "path"}
    inputs = {
        "data": data_digest(data),
        "tokenizer": tokenizer_digest(model_folder(config.model.path)),
    }

    def body(out: Output) -> Summary:
        outcomes = _outcomes(config, files, executor)
        if data_digest(data) != inputs["data"]:
            raise DataError(f"{data} changed while it was read", fix="run again when nothing writes to it")
        limits = {split: getattr(section, f"max_{split}_pairs") for split in SPLITS}
        by_split, rejections = select_pairs(outcomes, seed=config.seed, limits=limits)
        numbers = counts(by_split, rejections)
        _check_usable(numbers, rejections)
        for split, table in by_split.items():
            pq.write_table(table, out.path / f"{split}.parquet")
        with (out.path / REJECTIONS_FILE).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rejections.to_pylist())
        return Summary(counts=numbers)

    return make(config, "prepare", {**content, "seed": config.seed}, inputs, body, output=output)


class PrepareBlock:
    """Blocks of raw records to rows of OUTCOME_SCHEMA; built once per worker."""

    def __init__(self, config: RunConfig, root: str) -> None:
        self._section: PrepareConfig = config.prepare
        self._seed = config.seed
        self._root = Path(root)
        tokenizer = load_tokenizer(model_folder(config.model.path), trust_remote_code=config.model.trust_remote_code)
        self._tokenizer = PairTokenizer(
            tokenizer,
            template=self._section.template,
            max_prompt_tokens=self._section.max_prompt_tokens,
            max_answer_tokens=self._section.max_answer_tokens,
        )

    def __call__(self, blocks: pa.Table) -> pa.Table:
        rows = []
        for fields in blocks.to_pylist():
            block = Block(**fields)
            source = Path(block.path).name if self._root.is_file() else str(Path(block.path).relative_to(self._root))
            for line, record in read_block(block):
                rows.append({"source": source, "line": line, **self._outcome(record)})
        return pa.Table.from_pylist(rows, schema=OUTCOME_SCHEMA)

    def _outcome(self, record: Any) -> dict[str, Any]:
        pair = validate(record, self._section.group_key)
        if isinstance(pair, Rejection):
            return dataclasses.asdict(pair)
        encoded = self._tokenizer.encode(pair)
        if isinstance(encoded, Rejection):
            return dataclasses.asdict(encoded)
        tokens, truncated = encoded
        return {
            **self._texts(pair),
            "pair_id": tokens.pair_id,
            "prompt_ids": tokens.prompt_ids,
            "chosen_ids": tokens.chosen_ids,
            "rejected_ids": tokens.rejected_ids,
            "truncated_answers": truncated,
        }

    def _texts(self, pair: PreferencePair) -> dict[str, Any]:
        fields = dataclasses.asdict(pair)
        fields["split"] = split_of(
            pair.group,
            seed=self._seed,
            validation_fraction=self._section.validation_fraction,
            heldout_fraction=self._section.heldout_fraction,
        )
        return fields


def _outcomes(config: RunConfig, files: list[Path], executor: Executor) -> pa.Table:
    blocks = plan_blocks(files)
    reporter = Reporter.from_environment("prepare")
    tables = [pa.Table.from_pylist([dataclasses.asdict(block)]) for block in blocks]
    total = sum(block.records for block in blocks)
    done: list[pa.Table] = []
    for table in executor.map_tables(
        functools.partial(PrepareBlock, config, config.prepare.path), tables, uses_model=False
    ):
        done.append(table)
        reporter.progress(sum(map(len, done)), total, "records")
    return pa.concat_tables(done) if done else OUTCOME_SCHEMA.empty_table()


def _check_usable(numbers: dict[str, int], rejections: pa.Table) -> None:
    if numbers["pairs/train"]:
        return
    reasons = {key.removeprefix("rejected/"): n for key, n in numbers.items() if key.startswith("rejected/")}
    example = rejections.slice(0, 1).to_pylist()
    raise DataError(
        f"No training pair is left of {numbers['records']} records",
        got=f"rejections {reasons}; the first: {example}" if reasons else f"{numbers['used']} pairs, none in training",
        expected="records with prompt, chosen and rejected",
        fix="mend the data, or raise prepare.max_prompt_tokens if prompts are too long",
    )
