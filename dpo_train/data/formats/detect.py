"""Which format the records of a source have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.plain import read_hh, read_pairs
from dpo_train.data.formats.ranked import ANSWERS, PROMPTS, RANKS, RATINGS, read_ranking, read_ultrafeedback
from dpo_train.data.formats.transcripts import is_open_transcript, is_transcript
from dpo_train.data.formats.values import Columns, is_empty, is_list, near
from dpo_train.data.formats.votes import read_arena, read_helpsteer, read_shp, read_tldr
from dpo_train.data.pairs import PreferencePair, Rejection
from dpo_train.errors import ConfigError, DataError

Record = Mapping[Any, Any]
Reader = Callable[[Columns, SourceConfig], list[PreferencePair | Rejection]]


@dataclass(frozen=True, slots=True)
class Format:
    """How a format is read, and what tells it.

    ``needs`` is for people; ``targets`` are the names that ``fields`` may map, besides COMMON_TARGETS.
    """

    read: Reader
    fits: Callable[[Record], bool]
    needs: str
    targets: tuple[str, ...]


COMMON_TARGETS = ("system", "tools", "strength", "agreement", "origin", "group")


def _has(record: Record, *names: str) -> bool:
    return all(record.get(name) is not None for name in names)


def _any(record: Record, *names: str) -> bool:
    return any(record.get(name) is not None for name in names)


def _is_hh(record: Record) -> bool:
    answers = record.get("chosen"), record.get("rejected")
    texts = all(isinstance(answer, str) for answer in answers)
    return all(map(is_transcript, answers)) if is_empty(record.get("prompt")) else (
        texts and is_open_transcript(record["prompt"])
    )  # fmt: skip


def _is_ultrafeedback(record: Record) -> bool:
    return _any(record, "instruction", "prompt") and _objects_with(record.get("completions"), ("response",))


def _is_ranking(record: Record) -> bool:
    own = any(_objects_with(record.get(name), (*RANKS, *RATINGS)) for name in ANSWERS)
    beside = _any(record, *ANSWERS) and _any(record, *RANKS, *RATINGS)
    return _any(record, *PROMPTS) and (own or beside)


def _objects_with(value: Any, names: tuple[str, ...]) -> bool:
    """Whether a list (also one written as JSON) has objects with one of these fields."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and any(f'"{name}"' in value for name in names)
    return is_list(value) and any(isinstance(item, Mapping) and _any(item, *names) for item in value)


def _is_arena(record: Record) -> bool:
    voted = _has(record, "winner") or _has(record, "winner_model_a", "winner_model_b")
    return (_has(record, "prompt", "response_0", "response_1", "better_response_id")) or (
        voted
        and (_has(record, "conversation_a", "conversation_b") or _has(record, "prompt", "response_a", "response_b"))
    )


def _is_helpsteer(record: Record) -> bool:
    return _has(record, "response_1", "response_2", "preference_strength") or (
        _has(record, "response1", "response2", "overall_preference")
    )


_ANSWERS = ("chosen", "rejected")

FORMATS: Mapping[str, Format] = {
    "hh": Format(
        read_hh, _is_hh, "chosen and rejected: transcripts of Human: and Assistant: turns", ("prompt", *_ANSWERS)
    ),
    "pairs": Format(
        read_pairs,
        lambda record: _has(record, *_ANSWERS),
        "prompt, chosen, rejected; or chosen and rejected as conversations",
        ("prompt", *_ANSWERS, "score_chosen", "score_rejected", "margin"),
    ),
    "ultrafeedback": Format(
        read_ultrafeedback,
        _is_ultrafeedback,
        "instruction, completions: [{response, overall_score}]",
        ("prompt", "completions", "response", "score"),
    ),
    "ranking": Format(
        read_ranking,
        _is_ranking,
        "prompt, answers: [{answer, rank or score}]",
        ("prompt", "answers", "answer", "rank", "score"),
    ),
    "shp": Format(
        read_shp,
        lambda record: _has(record, "human_ref_A", "human_ref_B"),
        "history, human_ref_A, human_ref_B, labels",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "score_ratio"),
    ),
    "tldr": Format(
        read_tldr,
        lambda record: _has(record, "summaries", "choice"),
        "info: {post, title, subreddit}, summaries: [{text}, {text}], choice",
        ("info", "summaries", "choice"),
    ),
    "arena": Format(
        read_arena,
        _is_arena,
        "conversation_a and conversation_b, or prompt, response_a and response_b; winner",
        (
            "prompt", "conversation_a", "conversation_b", "response_a", "response_b", "winner", "winner_model_a",
            "winner_model_b", "winner_tie", "better_response_id",
        ),
    ),
    "helpsteer": Format(
        read_helpsteer,
        _is_helpsteer,
        "prompt, response_1, response_2, preference_strength",
        ("prompt", "response_1", "response_2", "preference_strength", "individual_preference"),
    ),
}  # fmt: skip
"""Name -> format. The order decides where a record fits several: the more special first."""


def detect(sample: Sequence[Any]) -> str:
    """The format of a source, from some of its records: the one that most of them fit.

    Raises:
        DataError: none fits; the message says what the data is instead, or how to name its columns.
    """
    records = [record for record in sample if isinstance(record, Mapping)]
    fitting = [name for record in records if (name := _format_of(record)) is not None]
    if fitting:
        counts = Counter(fitting)
        return max(FORMATS, key=lambda name: counts[name])  # of equals the first in order
    raise _unknown(records, len(sample), is_list_alone=len(sample) == 1 and is_list(sample[0]))


def resolve(source: SourceConfig, sample: Sequence[Any]) -> str:
    """The format that the config names; with ``fields`` alone `pairs`; else the one that the records have.

    Raises:
        ConfigError: ``fields`` maps a name that the format does not have.
        DataError: no format fits.
    """
    if source.format != "auto":
        name: str = source.format
    else:
        name = "pairs" if source.fields else detect(sample)
    targets = (*FORMATS[name].targets, *COMMON_TARGETS)
    if wrong := [target for target in source.fields or {} if target not in targets]:
        raise ConfigError(
            f"fields maps what the format {name} does not have",
            got=", ".join(wrong),
            expected=", ".join(targets),
            fix="write the format's name first and your column second: {prompt: YOUR_COLUMN}",
        )
    return name


def _format_of(record: Record) -> str | None:
    return next((name for name, format in FORMATS.items() if format.fits(record)), None)


def _unknown(records: Sequence[Record], count: int, *, is_list_alone: bool) -> DataError:
    if not records:
        if is_list_alone:
            return DataError(
                "The data's format cannot be recognised",
                got="this is a JSON array: a line that is a list, where a record should be",
                expected="JSON lines: an object in each line",
                fix="this is a JSON array: name it .json, or write each of its records into a line of its own",
            )
        got = f"{count} records, none of them an object with fields" if count else "no record"
        return DataError(
            "The data's format cannot be recognised",
            got=got,
            expected="records with named fields",
            fix='write each record as an object: {"prompt": ..., "chosen": ..., "rejected": ...}',
        )
    columns = Counter(name for record in records for name in record if isinstance(name, str))
    got = "the fields " + ", ".join(name[:40].encode(errors="backslashreplace").decode() for name in list(columns)[:30])
    if slips := _slips(records):
        mapped = ", ".join(f"{target}: {name[:40]}" for name, target in slips.items())
        hint = " and ".join(f"{target} by {name[:40]!r}" for name, target in slips.items())
        return DataError(
            f"The data's format cannot be recognised: did you mean {hint}?",
            got=got,
            fix=f"rename the columns, or name them in fields: {{{mapped}}}",
        )
    for fits, what, fix in _OTHERS:
        if sum(map(fits, records)) * 2 > len(records):
            return DataError(what, got=got, expected="two answers to the same prompt, one of them preferred", fix=fix)
    formats = "; ".join(f"{name}: {format.needs}" for name, format in FORMATS.items())
    return DataError(
        "The data's format cannot be recognised",
        got=got,
        expected=f"one of these formats ({formats})",
        fix="name your columns: fields: {prompt: YOUR_COLUMN, chosen: YOUR_COLUMN, rejected: YOUR_COLUMN}",
    )


def _slips(records: Sequence[Record]) -> dict[str, str]:
    """Column -> name that it almost has, of the first record that would fit a format by other names; empty without."""
    known = {target for format in FORMATS.values() for target in format.targets}
    for record in records[:20]:
        strange = [name for name in record if isinstance(name, str) and name not in known and name.isprintable()]
        slips = {name: target for target in sorted(known - set(record)) if (name := near(target, strange))}
        if slips and _format_of({slips.get(name, name): value for name, value in record.items()}):
            return slips
    return {}


_CONVERSATIONS = ("messages", "conversations", "conversation")
_SEVERAL = (*ANSWERS, "answer", "outputs", "candidates")
_PROMPTS = ("prompt", "instruction", "question", "input")
_COMPLETIONS = ("completion", "response", "output", "answer")
_OTHERS: tuple[tuple[Callable[[Record], bool], str, str], ...] = (
    (
        lambda record: _any(record, *_PROMPTS) and any(is_list(record.get(name)) for name in _SEVERAL),
        "These are several answers to each prompt, and nothing that is known as their rank or score",
        "name the format and your columns: format: ranking, fields: {prompt: YOUR_COLUMN, answers: YOUR_COLUMN, "
        "answer: FIELD_OF_AN_ANSWER, score: FIELD_OF_AN_ANSWER} (or rank; a list beside the answers if they are texts)",
    ),
    (
        lambda record: _any(record, *_COMPLETIONS, *_CONVERSATIONS) and _has(record, "label"),
        "This is unpaired preference data: single answers, each labelled good or bad (as KTO takes them)",
        "train it with a method for unpaired data, or pair good and bad answers to the same prompt as chosen, rejected",
    ),
    (
        lambda record: _any(record, *_PROMPTS) and _any(record, *_COMPLETIONS),
        "This is data for supervised fine-tuning: one answer to each prompt, and none that is worse",
        "add a worse answer to each prompt as rejected, or give a data set with preferences",
    ),
    (
        lambda record: _any(record, *_CONVERSATIONS, "text") and not _any(record, *_PROMPTS),
        "This is data for supervised fine-tuning: conversations or texts, without a preference",
        "give a data set with preferences",
    ),
    (
        lambda record: _any(record, *_PROMPTS) and len(record) <= 3 and not _any(record, *_ANSWERS),
        "These are prompts alone, without answers",
        "have answers generated and judged first, or give a data set with preferences",
    ),
)
