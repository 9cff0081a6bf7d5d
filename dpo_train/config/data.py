"""Raw data to scored pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import JsonValue

from dpo_train.config.kinds import STRICT, Count, Fraction, Positive, option

Format = Literal["auto", "pairs", "hh", "ultrafeedback", "ranking", "shp", "tldr", "arena", "helpsteer"]
Truncation = Literal["keep_start", "keep_end", "drop"]
Split = Literal["train", "validation", "heldout"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of raw records: where it lies and how it is read."""

    __pydantic_config__ = STRICT

    path: str = option(
        help="a file, folder or glob (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), here or at s3://; a "
        "folder that `datasets` saved; or hf://NAME, a data set of the Hugging Face hub"
    )
    name: str | None = option(None, "name of the set in reports and rules; default: the end of its path")
    format: Format = option("auto", "what the records look like (docs/data.md); auto: recognised by their fields")
    fields: dict[str, str] | None = option(
        None, "your own columns: {prompt: question, chosen: better, rejected: worse}; a dot goes into nested fields"
    )
    pairing: Literal["best_worst", "all", "ranking"] = option(
        "best_worst",
        "of ranked or scored answers: the best against the worst, all pairs of different rank, or the whole ranking "
        "for train.loss=plackett_luce",
    )
    min_strength: Annotated[float, Ge(0)] = option(
        0.0, "reject pairs whose preference is weaker than this (difference of scores, in the data's unit)"
    )
    group_key: str | None = option(None, "field whose value keeps records in one split; default: the prompt")
    split: Split | None = option(None, "put all its pairs into this split; default: by a hash of the group")
    weight: Positive | None = option(
        None, "its share of the training pairs, relative to the other sources; what is too much is left out"
    )
    hub_config: str | None = option(None, "configuration of a hub data set, where it has several")
    hub_split: str = option("train", "split of a hub data set, or of one that `datasets` saved, to read")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceConfig):
    """raw data -> validated, tokenised, split pairs"""

    __pydantic_config__ = STRICT

    path: str | None = option(  # type: ignore[assignment] # one source by itself, or several under `sources`
        None,
        "the raw data: " + SourceConfig.__dataclass_fields__["path"].metadata["help"],
    )
    sources: tuple[SourceConfig, ...] = option(
        (),
        "several sources instead of prepare.path, each with keys of its own: path, format, fields, weight, split, ...",
    )
    validation_fraction: Fraction = option(0.1, "share of the groups kept apart for choosing beta")
    heldout_fraction: Fraction = option(0.1, "share of the groups kept apart for the final evaluation")
    max_train_pairs: Count | None = option(None, "use at most this many training pairs (a seeded choice); default: all")
    max_validation_pairs: Count | None = option(None, "the same for validation")
    max_heldout_pairs: Count | None = option(None, "the same for held-out pairs")
    template: Literal["chat", "plain"] = option(
        "chat", "chat: the tokenizer's chat template; plain: the prompt's text as it is, continued by the answer"
    )
    chat_template: str | None = option(None, "a Jinja file to use instead of the tokenizer's own chat template")
    template_options: dict[str, JsonValue] | None = option(
        None, "variables for the chat template, such as {enable_thinking: false}"
    )
    max_prompt_tokens: Count = option(1024, "longest prompt; prompt_truncation says what happens to a longer one")
    max_answer_tokens: Count = option(512, "longest answer; answer_truncation says what happens to a longer one")
    prompt_truncation: Truncation = option(
        "drop", "of a prompt that is too long: keep its start, its end (the latest turns), or drop the pair"
    )
    answer_truncation: Truncation = option("keep_start", "the same for an answer")
    evaluation_prompts: str | None = option(
        None,
        "file of prompts that no pair may share an n-gram with: .jsonl, .json or .csv with `prompt`, or .txt with a "
        "prompt a line; also .gz",
    )
    evaluation_ngram: Count = option(13, "words in a row that count as overlap with an evaluation prompt")
    report_examples: Annotated[int, Ge(0), Le(50)] = option(3, "examples of each kind in the report")
    redact: bool = option(False, "keep the texts of records out of report and rejections: lengths and reasons only")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, also where there is only ``path``."""
        if self.path is None:
            return self.sources
        names = [item.name for item in dataclasses.fields(SourceConfig)]
        return (SourceConfig(**{name: getattr(self, name) for name in names}),)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """pairs -> pairs with the reference's per-token log-probs"""

    __pydantic_config__ = STRICT

    row_tokens: Count = option(2048, "tokens per packed row while scoring")
