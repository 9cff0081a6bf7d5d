"""raw data -> validated, tokenised pairs by split, every rejection with its reason, and a report on both"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, mirror
from dpo_train.config import RunConfig, SourceConfig, to_dict
from dpo_train.data.folder import model_folder, tokenizer_digest
from dpo_train.data.formats import REASONS, resolve
from dpo_train.data.ngrams import read_prompts
from dpo_train.data.pairs import SPLITS
from dpo_train.data.profile import KEPT, Profile, merge
from dpo_train.data.report import warnings, write_report
from dpo_train.data.select import Limit, limits_for
from dpo_train.data.shards import SHARDS_FILE, Shard, manifest
from dpo_train.data.sources import Block, plan, sample, source_digest
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
from dpo_train.errors import ConfigError, DataError
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, storage_options
from dpo_train.stages.executor import Executor, InProcess

REJECTIONS_FILE = "rejections.jsonl"
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
}

_PLACES = ("path", "sources", "chat_template", "evaluation_prompts")
"""Options that say where something lies; what lies there goes into the identity by its digest."""


def prepare(config: RunConfig, executor: Executor, *, output: Path | str | None = None) -> Artifact:
    """Makes the shards of each split (PAIR_SCHEMA), ``rejections.jsonl``, ``report.json`` and ``report.html``.

    Raises:
        DataError: the data cannot be read or recognised, or no training pair is left.
        ModelError: the tokenizer cannot be loaded or has no chat template.
    """
    section = config.prepare
    sources = section.all_sources
    content = {key: value for key, value in to_dict(section).items() if key not in _PLACES}
    content["sources"] = [{k: v for k, v in to_dict(source).items() if k != "path"} for source in sources]
    content |= {"seed": config.seed, "chat_template": chat_template(config)}
    evaluation_prompts = _evaluation_prompts(config)
    inputs = data_digests(sources)
    inputs["tokenizer"] = tokenizer_digest(model_folder(config.model.path))
    if evaluation_prompts:
        inputs["evaluation_prompts"] = _digest(evaluation_prompts)

    def body(out: Output) -> Summary:
        reporter = Reporter.from_environment("prepare")
        blocks = [block for index, source in enumerate(sources) for block in plan(source, index)]
        recipe = Recipe(
            section=section,
            seed=config.seed,
            formats=[_format(source, index, blocks, reporter) for index, source in enumerate(sources)],
            evaluation_prompts=evaluation_prompts,
            home=out.home,
        )
        buckets = _read(config, recipe, blocks, executor, reporter)
        if data_digests(sources) != {key: inputs[key] for key in data_digests_names(sources)}:
            raise DataError("The data changed while they were read", fix="run again when nothing writes to them")
        # Starting workers takes longer than deciding one bucket.
        near = InProcess() if buckets.count == 1 else executor
        limits = _limits(config, buckets, near)
        labels = [label(source) for source in sources]
        finished = _finish(buckets, recipe, limits, labels, near, reporter)
        shards: dict[str, list[Shard]] = defaultdict(list)
        for row in finished:
            for split, fields in json.loads(row["shards"]).items():
                shards[split].append(Shard(**fields))
        profiles = functools.reduce(merge, (Profile.from_json(row["profile"]) for row in finished))
        _write_rejections(out, [row["rejections"] for row in finished])
        numbers = _counts(profiles, shards)
        _check_usable(numbers, out.path / REJECTIONS_FILE)
        out.write_json(SHARDS_FILE, manifest(shards))
        out.adopt({shard.file: shard.bytes for some in shards.values() for shard in some})
        write_report(profiles, out.path, reasons=REASONS)
        for text in warnings(profiles):
            reporter.message(f"note: {text}")
        discard(out.home, WORK)
        return Summary(counts=numbers, details={"formats": recipe.formats})

    return make(config, "prepare", content, inputs, body, output=output, scratch=(WORK,))


def label(source: SourceConfig) -> str:
    """A source's name for people: the end of a path here, the whole of an address."""
    return source.path if "://" in source.path else Path(source.path).name


def data_digests(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """Digest of each source's content, by the names under which a record lists them."""
    return dict(zip(data_digests_names(sources), map(source_digest, sources), strict=True))


def data_digests_names(sources: Sequence[SourceConfig]) -> list[str]:
    """``data`` for the only source, ``data/0`` and so on for several."""
    return ["data"] if len(sources) == 1 else [f"data/{index}" for index in range(len(sources))]


def chat_template(config: RunConfig) -> str | None:
    """The text of the user's own chat template.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = config.prepare.chat_template
    return None if path is None else _read_file(path, "prepare.chat_template").decode(errors="replace")


def _evaluation_prompts(config: RunConfig) -> list[str]:
    path = config.prepare.evaluation_prompts
    return [] if path is None else read_prompts(_read_file(path, "prepare.evaluation_prompts"), path)


def _read_file(path: str, option: str) -> bytes:
    if storage.is_remote(path):
        return storage.read_bytes(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", fix=f"set {option} to a file") from None


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


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
    from dpo_train.data.tokens import PairTokenizer, TokenOptions, load_tokenizer

    section = config.prepare
    storage.use(storage_options(config))
    tokenizer = load_tokenizer(model_folder(config.model.path), trust_remote_code=config.model.trust_remote_code)
    options = TokenOptions(
        template=section.template,
        chat_template=template,
        template_options=section.template_options or {},
        max_prompt_tokens=section.max_prompt_tokens,
        max_answer_tokens=section.max_answer_tokens,
        prompt_truncation=section.prompt_truncation,
        answer_truncation=section.answer_truncation,
    )
    return PrepareBlock(recipe, PairTokenizer(tokenizer, options))


def _read(
    config: RunConfig, recipe: Recipe, blocks: Sequence[Block], executor: Executor, reporter: Reporter
) -> Buckets:
    """Every record to candidates, in parts on disk."""
    tasks = [
        pa.Table.from_pylist([{**dataclasses.asdict(block), "block": number}]) for number, block in enumerate(blocks)
    ]
    build = functools.partial(_build_worker, config, recipe, chat_template(config))
    total = sum(block.size_bytes for block in blocks)
    rows: list[dict[str, Any]] = []
    done = 0
    for table in executor.map_tables(build, tasks, uses_model=False):
        rows += table.to_pylist()
        done += sum(table["read_bytes"].to_pylist())
        reporter.progress(round(done / 1e6, 2), round(total / 1e6, 2), "MB")
    rows.sort(key=lambda row: (row["block"], row["file"]))
    offsets = _line_offsets(blocks, rows)
    parts = [Part(row["file"], offsets[row["block"]]) for row in rows if row["rows"]]
    return Buckets(home=recipe.home, parts=parts, count=num_buckets(sum(row["bytes"] for row in rows)))


def _line_offsets(blocks: Sequence[Block], rows: Sequence[dict[str, Any]]) -> list[int]:
    """What to add to a block's line numbers: the lines of the blocks before it in the same file."""
    lines: dict[int, int] = defaultdict(int)
    for row in rows:
        lines[row["block"]] += row["lines"]
    offsets, before, previous = [], 0, None
    for number, block in enumerate(blocks):
        before = before if (block.dataset, block.path) == previous else 0
        offsets.append(0 if block.first_line else before)
        before += lines[number]
        previous = (block.dataset, block.path)
    return offsets


def _limits(config: RunConfig, buckets: Buckets, executor: Executor) -> list[Limit]:
    """Thresholds for splits that may hold only so many pairs, and for a mixture by weight."""
    section = config.prepare
    most = {split: getattr(section, f"max_{split}_pairs") for split in SPLITS}
    weights = [source.weight for source in section.all_sources]
    if all(value is None for value in (*most.values(), *weights)):
        return []
    build = functools.partial(_build_measure, config, buckets)
    tables = list(executor.map_tables(build, _numbers(buckets), uses_model=False))
    table = pa.concat_tables(tables)
    found = {}
    for split, dataset in {*zip(table["split"].to_pylist(), table["dataset"].to_pylist(), strict=True)}:
        mask = pc.and_(pc.equal(table["split"], split), pc.equal(table["dataset"], dataset))
        found[split, dataset] = table["key"].filter(mask).to_numpy()
    return limits_for(found, most, weights)


def _build_measure(config: RunConfig, buckets: Buckets) -> MeasureBucket:
    storage.use(storage_options(config))
    return MeasureBucket(buckets, config.seed)


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
) -> list[dict[str, Any]]:
    build = functools.partial(_build_finish, storage.options(), buckets, recipe, limits, labels)
    rows: list[dict[str, Any]] = []
    for table in executor.map_tables(build, _numbers(buckets), uses_model=False):
        rows += table.to_pylist()
        reporter.progress(len(rows), buckets.count, "buckets")
    return sorted(rows, key=lambda row: int(row["bucket"]))


def _write_rejections(out: Output, names: Sequence[str]) -> None:
    """One file in the order of the data, a line of each bucket's at a time."""

    def lines(name: str) -> Iterator[tuple[tuple[Any, ...], str]]:
        with mirror(out.home).fetch(name).open(encoding="utf-8") as stream:
            for text in stream:
                row = json.loads(text)
                place = row.pop("dataset"), row["source"], row["line"], row["candidate"]
                yield place, json.dumps(row)

    with (out.path / REJECTIONS_FILE).open("w", encoding="utf-8") as stream:
        for _, text in heapq.merge(*map(lines, names), key=lambda item: item[0]):
            stream.write(text + "\n")


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
        fix=_FIXES.get(max(reasons, key=lambda reason: reasons[reason], default=""), _FIX),
    )
