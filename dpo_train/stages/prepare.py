"""raw data -> validated, tokenised pairs by split, every rejection with its reason, and a report on both"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, mirror
from dpo_train.config import RunConfig, SourceConfig, to_dict
from dpo_train.data.folder import model_folder, tokenizer_digest
from dpo_train.data.formats import REASONS, resolve
from dpo_train.data.pairs import SPLITS
from dpo_train.data.profile import KEPT, Profile, merge
from dpo_train.data.report import warnings, write_report
from dpo_train.data.select import Limit, limits_for
from dpo_train.data.shards import SHARDS_FILE, Shard, manifest
from dpo_train.data.sources import BLOCK_BYTES, Block, plan, sample
from dpo_train.data.work import (
    WORK,
    Buckets,
    FinishBucket,
    MeasureBucket,
    Part,
    PrepareBlock,
    Recipe,
    num_buckets,
)
from dpo_train.errors import DataError
from dpo_train.progress import Reporter
from dpo_train.stages.check import most_positions
from dpo_train.stages.common import make, storage_options
from dpo_train.stages.executor import Executor, InProcess
from dpo_train.stages.prepare_inputs import (
    chat_template,
    check_apart,
    data_digests,
    digest_texts,
    evaluation_prompts,
    label,
    token_options,
    writes_the_day,
)

REJECTIONS_FILE = "rejections.jsonl"
WANTED_TASKS, MOST_TASK_BYTES, MOST_TASK_BLOCKS = 64, 8 << 20, 512
"""Raw bytes of a task: small enough for a moving progress bar, large enough for few parts."""
MOST_OPEN_FILES = 200
MOST_BUCKETS_NEAR = 16
"""So many are decided in this process, one at a time: workers take 5 s to start, and a bucket 0.2 s."""
SAMPLE_RECORDS = 64
"""Records by which a source's format is recognised."""

_NO_RECORD = "check that the data was written, and that prepare.path is the right place"
_FIX = "mend the data; docs/data.md says what each reason means"
# By the most frequent reason; with no rejection at all every pair went into another split.
_FIXES = {
    "": "lower prepare.heldout_fraction and prepare.validation_fraction, or give more data",
    "missing_field": "name your columns in prepare.fields ({prompt: YOUR_COLUMN}); check format and group_key",
    "prompt_too_long": "raise prepare.max_prompt_tokens, or set prepare.prompt_truncation",
    "answer_too_long": "raise prepare.max_answer_tokens, or set prepare.answer_truncation",
    "below_min_strength": "lower min_strength",
    "over_limit": "raise prepare.max_train_pairs",
    "over_weight": "raise prepare.max_train_pairs, or look at the sources' weights",
}

_PLACES = ("path", "name", "sources", "chat_template", "evaluation_prompts")
"""Options that say where something lies; what lies there goes into the identity by its digest."""


def prepare(config: RunConfig, executor: Executor, *, output: Path | str | None = None) -> Artifact:
    """Makes the shards of each split (PAIR_SCHEMA), ``rejections.jsonl``, ``report.json`` and ``report.html``.

    Raises:
        DataError: the data cannot be read or recognised, or no training pair is left.
        ModelError: the tokenizer cannot be loaded or has no chat template.
    """
    section = config.prepare
    sources = section.all_sources
    check_apart(config)
    content = {key: value for key, value in to_dict(section).items() if key not in _PLACES}
    content["sources"] = [{k: v for k, v in to_dict(source).items() if k not in _PLACES} for source in sources]
    content |= {"seed": config.seed, "chat_template": chat_template(config)}
    if writes_the_day(config):
        content["day"] = time.strftime("%Y-%m-%d")
    benchmark = evaluation_prompts(config)
    digests = data_digests(sources)
    inputs = dict(digests)
    inputs["tokenizer"] = tokenizer_digest(model_folder(config.model.path))
    if benchmark:
        inputs["evaluation_prompts"] = digest_texts(benchmark)

    def body(out: Output) -> Summary:
        reporter = Reporter.from_environment("prepare")
        blocks = [block for index, source in enumerate(sources) for block in plan(source, index)]
        recipe = Recipe(
            section=section,
            seed=config.seed,
            formats=[_format(source, index, blocks, reporter) for index, source in enumerate(sources)],
            evaluation_prompts=benchmark,
            home=out.home,
        )
        buckets = _read(config, recipe, blocks, executor, reporter)
        if data_digests(sources) != digests:
            raise DataError("The data changed while they were read", fix="run again when nothing writes to them")
        near = InProcess() if buckets.count <= MOST_BUCKETS_NEAR else executor
        limits = _limits(config, buckets, near)
        labels = [label(source) for source in sources]
        finished = _finish(buckets, recipe, limits, labels, near, reporter)
        shards = finished.shards
        _write_rejections(out, finished.rejections)
        profiles = finished.profile
        numbers = _counts(profiles, shards)
        _check_usable(numbers, out.path / REJECTIONS_FILE)
        out.write_json(SHARDS_FILE, manifest(shards))
        out.adopt({shard.file: shard.bytes for some in shards.values() for shard in some})
        write_report(profiles, out.path, reasons=REASONS)
        for text in [*warnings(profiles), *_length_notes(config)]:
            reporter.message(f"note: {text}")
        return Summary(counts=numbers, details={"formats": recipe.formats})

    artifact = make(config, "prepare", content, inputs, body, output=output, scratch=(WORK,))
    if not (artifact.reused and storage.is_remote(artifact.home)):
        discard(artifact.home, WORK, tell=Reporter.from_environment("prepare").message)
    return artifact


class _Finished(NamedTuple):
    """What all buckets came to."""

    shards: dict[str, list[Shard]]
    rejections: list[str]
    """Files, one of each bucket."""
    profile: Profile


def _format(source: SourceConfig, index: int, blocks: Sequence[Block], reporter: Reporter) -> str:
    if source.format != "auto":
        return resolve(source, [])
    records = sample([block for block in blocks if block.dataset == index], SAMPLE_RECORDS)
    if not records:
        return "pairs"  # nothing that can be decoded: each record is rejected with its reason
    found = resolve(source, records)
    reporter.message(f"{label(source)} is read as {found}")
    return found


def _build_worker(config: RunConfig, recipe: Recipe, template: str | None) -> PrepareBlock:
    """Builds the worker where it runs; transformers is imported there and not here."""
    from dpo_train.data.tokens import PairTokenizer, load_tokenizer

    section = config.prepare
    storage.use(storage_options(config))
    tokenizer = load_tokenizer(model_folder(config.model.path), trust_remote_code=config.model.trust_remote_code)
    return PrepareBlock(recipe, PairTokenizer(tokenizer, token_options(section, template)))


def _read(
    config: RunConfig, recipe: Recipe, blocks: Sequence[Block], executor: Executor, reporter: Reporter
) -> Buckets:
    """Every record to candidates, in parts on disk."""
    tasks = [pa.Table.from_pylist(rows) for rows in _tasks(blocks)]
    build = functools.partial(_build_worker, config, recipe, chat_template(config))
    total = sum(block.size_bytes for block in blocks)
    done, lines, parts = 0, [0] * len(blocks), []
    for table in executor.map_tables(build, tasks, uses_model=False):
        for row in table.to_pylist():
            if row["file"] is None:
                lines[row["block"]] = row["lines"]
                done += row["read_bytes"]
            else:
                parts.append(Part(row["file"], row["bytes"], row["lowest"], row["highest"]))
        reporter.progress(round(done / 1e6, 2), round(total / 1e6, 2), "MB")
    parts.sort(key=lambda part: part.file)
    count = num_buckets(sum(part.bytes for part in parts))
    return Buckets(home=recipe.home, parts=parts, line_offsets=_line_offsets(blocks, lines), count=count)


def _tasks(blocks: Sequence[Block]) -> Iterator[list[dict[str, Any]]]:
    """Blocks in their order, several to a task where they are small or many: every bucket looks at every part."""
    enough = min(max(sum(block.size_bytes for block in blocks) // WANTED_TASKS, BLOCK_BYTES), MOST_TASK_BYTES)
    rows: list[dict[str, Any]] = []
    size = 0
    for number, block in enumerate(blocks):
        rows.append({**dataclasses.asdict(block), "block": number})
        size += block.size_bytes
        if size >= enough or len(rows) == MOST_TASK_BLOCKS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _line_offsets(blocks: Sequence[Block], lines: Sequence[int]) -> npt.NDArray[np.int64]:
    """What to add to a block's line numbers: the lines of the blocks before it in the same file."""
    offsets, before, previous = [], 0, None
    for block, count in zip(blocks, lines, strict=True):
        before = before if (block.dataset, block.path) == previous else 0
        offsets.append(0 if block.first_line else before)
        before += count
        previous = (block.dataset, block.path)
    return np.array(offsets, np.int64)


def _limits(config: RunConfig, buckets: Buckets, executor: Executor) -> list[Limit]:
    """Thresholds for splits that may hold only so many pairs, and for a mixture by weight."""
    section = config.prepare
    most = {split: getattr(section, f"max_{split}_pairs") for split in SPLITS}
    weights = [source.weight for source in section.all_sources]
    if all(value is None for value in (*most.values(), *weights)):
        return []
    build = functools.partial(_build_measure, storage.options(), buckets, config.seed)
    tables = list(executor.map_tables(build, _numbers(buckets), uses_model=False))
    if not tables:
        return []  # not one pair could be used
    table = pa.concat_tables(tables)
    found = {}
    for split, dataset in (row.values() for row in table.group_by(["split", "dataset"]).aggregate([]).to_pylist()):
        mask = pc.and_(pc.equal(table["split"], split), pc.equal(table["dataset"], dataset))
        found[split, dataset] = table["key"].filter(mask).to_numpy()
    return limits_for(found, most, weights)


def _build_measure(options: storage.Options, buckets: Buckets, seed: int) -> MeasureBucket:
    storage.use(options)
    return MeasureBucket(buckets, seed)


def _build_finish(
    options: storage.Options, buckets: Buckets, recipe: Recipe, limits: Sequence[Limit], labels: Sequence[str]
) -> FinishBucket:
    storage.use(options)
    return FinishBucket(buckets, recipe, limits, labels)


def _numbers(buckets: Buckets) -> list[pa.Table]:
    return [pa.table({"bucket": [number]}) for number in range(buckets.count)]


def _finish(
    buckets: Buckets,
    recipe: Recipe,
    limits: Sequence[Limit],
    labels: Sequence[str],
    executor: Executor,
    reporter: Reporter,
) -> _Finished:
    build = functools.partial(_build_finish, storage.options(), buckets, recipe, limits, labels)
    rows: list[dict[str, Any]] = []
    found: Profile | None = None
    for table in executor.map_tables(build, _numbers(buckets), uses_model=False):
        for row in table.to_pylist():
            # At once: a profile may hold many names, and there may be many buckets.
            here = Profile.from_json(row.pop("profile"))
            found = here if found is None else merge(found, here)
            rows.append(row)
        reporter.progress(len(rows), buckets.count, "buckets")
    assert found is not None
    rows.sort(key=lambda row: int(row["bucket"]))
    shards: dict[str, list[Shard]] = defaultdict(list)
    for row in rows:
        for split, fields in json.loads(row["shards"]).items():
            shards[split].append(Shard(**fields))
    return _Finished(shards, [row["rejections"] for row in rows], found)


def _write_rejections(out: Output, names: Sequence[str]) -> None:
    """One file in the order of the data, a line of each bucket's at a time."""
    files = [mirror(out.home).fetch(name) for name in names]
    files = [file for file in files if file.stat().st_size]
    for turn in itertools.count():
        if len(files) <= MOST_OPEN_FILES:
            break
        groups = [files[start : start + MOST_OPEN_FILES] for start in range(0, len(files), MOST_OPEN_FILES)]
        files = [_merge(group, out.path / WORK / f"merged-{turn}-{n}.jsonl") for n, group in enumerate(groups)]
    _merge(files, out.path / REJECTIONS_FILE)


def _merge(files: Sequence[Path], target: Path) -> Path:
    """Files of JSON lines in the order of the data to one in that order."""

    def place(line: str) -> tuple[Any, ...]:
        row = json.loads(line)
        return row["dataset"], row["source"], row["line"], row["candidate"]

    with contextlib.ExitStack() as stack, target.open("w", encoding="utf-8") as stream:
        stream.writelines(heapq.merge(*(stack.enter_context(f.open(encoding="utf-8")) for f in files), key=place))
    return target


def _length_notes(config: RunConfig) -> list[str]:
    """Scoring refuses what the model cannot read; a person should hear of it before."""
    section = config.prepare
    allowed = section.max_prompt_tokens + section.max_answer_tokens
    positions = most_positions(model_folder(config.model.path))
    if positions is None or allowed <= positions:
        return []
    return [
        f"The model reads {positions:,} tokens, and prepare.max_prompt_tokens with prepare.max_answer_tokens allows "
        f"{allowed:,}: a longer prompt with its answer will be refused when it is scored."
    ]


def _counts(profile: Profile, shards: dict[str, list[Shard]]) -> dict[str, int]:
    """For the record: ``records = used + rejected`` and ``candidate_pairs = kept_pairs + rejected_pairs``."""
    records, used = sum(profile.records.values()), sum(profile.used.values())
    reasons: dict[str, int] = defaultdict(int)
    for (_, reason, _), number in profile.cells.items():
        reasons[reason] += number
    kept = reasons.pop(KEPT, 0)
    truncated = profile.truncated
    return {
        "records": records,
        "used": used,
        "rejected": records - used,
        "candidate_pairs": kept + sum(reasons.values()),
        "kept_pairs": kept,
        "rejected_pairs": sum(reasons.values()),
        **{f"rejected/{reason}": number for reason, number in sorted(reasons.items())},
        **{f"pairs/{split}": sum(shard.rows for shard in shards[split]) for split in SPLITS},
        "truncated_prompts": truncated.get("prompt", 0),
        "truncated_answers": sum(truncated.get(part, 0) for part in ("chosen", "rejected", "others")),
    }


def _check_usable(numbers: dict[str, int], rejections: Path) -> None:
    if numbers["pairs/train"]:
        return
    if not numbers["records"]:
        raise DataError("No record in the data", got="files without records", expected="at least one", fix=_NO_RECORD)
    reasons = {key.removeprefix("rejected/"): n for key, n in numbers.items() if key.startswith("rejected/")}
    counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    with rejections.open(encoding="utf-8") as stream:
        example = stream.readline().strip()
    raise DataError(
        f"No training pair is left of {numbers['records']} record{'s' * (numbers['records'] != 1)}",
        got=f"rejections: {counted}; the first: {example}" if reasons else f"{numbers['used']} pairs, none in training",
        expected="records that hold a prompt, a better and a worse answer",
        fix=f"see {rejections}; " + _FIXES.get(max(reasons, key=lambda reason: reasons[reason], default=""), _FIX),
    )
