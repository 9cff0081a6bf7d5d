"""Broken input to `prepare`, case by case: what becomes of each record, or in which words the data is refused.

BAD_RECORDS  one bad line between two good ones
FILES        whole files and folders of which something is left
REFUSED      data of which nothing can be used: one line, exit code 2
CONFIGS      the same for what the config says of the data
"""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.config import RunConfig, SourceConfig
from dpo_train.data import report_page
from dpo_train.data.formats import REASONS
from dpo_train.data.sources import base, source_digest
from dpo_train.errors import ConfigError, DataError, DpoError
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess
from tests.command import Finished, dpo, write_config
from tests.tiny import tiny_config

Content = bytes | Callable[[Path], object]
Place = tuple[str, int, str]
"""File, line and reason of a rejection."""

# Words that only programmers know.
JARGON = re.compile(
    r"NoneType|\b(dict|str|int|float|bool|tuple|codec|mappingproxy|datetime|errno)\b|Traceback|Exception|Error\b"
    r"|object at 0x|recursion|set_int_max",
    re.IGNORECASE,
)


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Any:
    """The report's plots take ten times as long as all the rest; tests/unit/data/test_prepare_report.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_plots", lambda content: {})
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("bad"))


def good(number: int, **changes: Any) -> dict[str, Any]:
    """A record that can be used; a change to None takes the field away."""
    record = {
        "prompt": f"tell me about cat {number}",
        "chosen": "kind",
        "rejected": "rude",
        "margin": 2,
        "meta": {"film": f"film {number}"},
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


def null(*names: str) -> dict[str, Any]:
    """A record like good(9) of which these fields are there and null."""
    return {**good(9), **dict.fromkeys(names)}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages from "role: content"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def vote(number: int, winner: str = "model_a") -> dict[str, Any]:
    """A record of another format than good()."""
    return {"prompt": f"sea {number}", "response_a": "calm", "response_b": "cold", "winner": winner}


A, B, C, D = (lines(good(number)) for number in range(1, 5))
TURNS = ("user: cat", "assistant: kind", "user: dog")


def prepared(config: RunConfig, folder: Path, **changes: Any) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Counts and rejections. All pairs are training pairs, unless a source says otherwise."""
    section = replace(config.prepare, **{"group_key": None, "split": "train", **changes})
    made = prepare(replace(config, store=str(folder / "store"), prepare=section), InProcess())
    counts = dict(made.record.counts)
    assert counts["records"] == counts["used"] + counts["rejected"]
    assert counts["candidate_pairs"] == counts["kept_pairs"] + counts["rejected_pairs"]
    return counts, [json.loads(line) for line in (made.path / "rejections.jsonl").read_text().splitlines()]


def told(error: DpoError) -> str:
    """The message, which is one line of plain words and ends with what to do."""
    message = str(error)
    assert "\n" not in message
    assert not JARGON.search(message), message
    assert re.search(r"\. What to do: .+\.$", message), message
    assert error.exit_code == 2
    return message


def write(folder: Path, files: Mapping[str, Content]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
    return folder


@dataclass(frozen=True)
class Bad:
    """A bad line, why it is rejected, and what the detail has to say."""

    line: Any
    reason: str
    detail: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return self.line + b"\n" if isinstance(self.line, bytes) else lines(self.line)


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
LONG = "kind and " * 20
ZERO_WIDTH = "\u200b\ufeff\u2060 \u00a0"

BAD_RECORDS: dict[str, Bad] = {
    # no record
    "cut in the middle": Bad(A[:30], "undecodable", "no JSON: unterminated string"),
    "no JSON at all": Bad(b"hello", "undecodable", "no JSON: expecting value, at character 0"),
    "printed by Python": Bad(b"{'prompt': 'cat'}", "undecodable", "no JSON: expecting property name"),
    "comma behind a line": Bad(A.strip() + b",", "undecodable", "more text after the value"),
    "two records in a line": Bad(A.strip() + B.strip(), "undecodable", "more text after the value"),
    "two records with a lone CR between": Bad(
        A.strip() + b"\r" + B.strip(), "undecodable", "more text after the value"
    ),
    "NUL bytes": Bad(b"\0" * 8, "undecodable", "no JSON"),
    "NUL byte in a text": Bad(A.strip().replace(b"cat", b"c\0t"), "undecodable", "invalid control character"),
    "Latin-1": Bad(A.strip().replace(b"cat", b"caf\xe9"), "undecodable", "byte 0xe9 at position 29 is not UTF-8"),
    "lone surrogate, escaped": Bad(A.strip().replace(b"cat", b"\\ud800"), "undecodable", "a lone surrogate"),
    "lone surrogate, raw": Bad(A.strip().replace(b"cat", b"\xed\xa0\x80"), "undecodable", "byte 0xed"),
    "two million brackets": Bad(DEEP, "undecodable", "deeper than can be read"),
    "number of 5,000 digits": Bad(b'{"margin": ' + b"1" * 5000 + b"}", "undecodable", "more than 4300 digits"),
    "key twice": Bad(A.strip()[:-1] + b', "chosen": "calm"}', "undecodable", "the key 'chosen' stands twice"),
    "a list": Bad([good(9)], "not_an_object", "got a list, expected an object"),
    "a number": Bad(3, "not_an_object", "got a number"),
    "a text": Bad("cat", "not_an_object", "got text"),
    "null": Bad(b"null", "not_an_object", "got null"),
    "a boolean": Bad(True, "not_an_object", "got a boolean"),
    # fields
    "no field": Bad({}, "missing_field", "no value for prompt, chosen, rejected; the record has no field"),
    "no chosen": Bad(good(9, chosen=None), "missing_field", "no value for chosen; the record has the fields prompt"),
    "chosen is null": Bad(null("chosen"), "missing_field", "no value for chosen"),
    "all is null": Bad(null("prompt", "chosen", "rejected"), "missing_field", "no value for prompt, chosen, rejected"),
    "prompt is null": Bad(null("prompt"), "missing_field", "no prompt"),
    "no prompt and texts": Bad(good(9, prompt=None), "missing_field", "no prompt, and texts without turns"),
    "two columns could be the prompt": Bad(
        good(9, prompt=None, question="a", input="b"), "missing_field", "question and input could each be it"
    ),
    "another format": Bad(vote(1), "missing_field", "no value for chosen, rejected; the record has the fields prompt"),
    "one answer, labelled": Bad(
        {"prompt": "a", "completion": "b", "label": True}, "missing_field", "no value for chosen"
    ),
    "prompt is a number": Bad(good(9, prompt=3), "wrong_type", "prompt is a number, expected text or a list"),
    "prompt is an object": Bad(good(9, prompt={"text": "a"}), "wrong_type", "has the role null"),
    "chosen is a boolean": Bad(good(9, chosen=True), "wrong_type", "chosen is a boolean"),
    "nulls in a list": Bad(good(9, prompt=[None]), "wrong_type", "a message of prompt is null"),
    "nulls in a message": Bad(
        good(9, prompt=[{"role": None, "content": None}]), "wrong_type", "a message of prompt has the role null"
    ),
    "content is null": Bad(
        good(9, prompt=[{"role": "user", "content": None}]), "wrong_type", "no text content and no tool call"
    ),
    "content is a number": Bad(
        good(9, prompt=[{"role": "user", "content": 3}]), "wrong_type", "content of a message of prompt is a number"
    ),
    "misspelt role": Bad(good(9, prompt=talk("usr: cat")), "wrong_type", "the role 'usr', expected system, user"),
    "image": Bad(
        good(9, prompt=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]), "not_text", "type image"
    ),
    "tools that are no JSON": Bad(good(9, tools="[{"), "wrong_type", "tools is text that is no JSON"),
    "tools that are no list": Bad(good(9, tools="{}"), "wrong_type", "tools is an object, expected a list"),
    "score is a word": Bad(
        good(9, score_chosen="good", score_rejected=1),
        "wrong_type",
        "score_chosen is the text 'good', expected a number",
    ),
    "score is a boolean": Bad(
        good(9, score_chosen=True, score_rejected=1), "wrong_type", "score_chosen is a boolean, expected a number"
    ),
    "score is NaN": Bad(good(9, margin=float("nan")), "wrong_type", "margin is no finite number"),
    "score is infinite": Bad(good(9, margin=float("inf")), "wrong_type", "margin is no finite number"),
    "score is 1e999": Bad(lines(good(9)).strip().replace(b"2", b"1e999"), "wrong_type", "margin is no finite number"),
    "share above 1": Bad(good(9, agreement=80), "wrong_type", "agreement is 80, expected a share from 0 to 1"),
    "group is missing": Bad(good(9, meta=None), "missing_field", "no value for meta.film", {"group_key": "meta.film"}),
    "group is null": Bad(
        good(9, meta={"film": None}), "missing_field", "no value for meta.film", {"group_key": "meta.film"}
    ),
    "group is a list": Bad(
        good(9, meta={"film": [1]}),
        "wrong_type",
        "meta.film is a list, expected text or a number",
        {"group_key": "meta.film"},
    ),
    # content
    "empty prompt": Bad(good(9, prompt=""), "empty_prompt"),
    "invisible prompt": Bad(good(9, prompt=ZERO_WIDTH), "empty_prompt"),
    "no turn": Bad(good(9, prompt=[], chosen=[], rejected=[]), "empty_answer", "chosen has no turn"),
    "empty answer": Bad(good(9, chosen=""), "empty_answer", "chosen"),
    "white space as answer": Bad(good(9, rejected=" \n\t"), "empty_answer", "rejected"),
    "invisible answer": Bad(good(9, rejected=ZERO_WIDTH), "empty_answer", "rejected"),
    "identical answers": Bad(good(9, rejected="kind"), "identical_answers"),
    "roles out of order": Bad(
        good(9, prompt=talk("assistant: a", "assistant: b", "user: c")), "roles_out_of_order", "turns 1 and 2 are both"
    ),
    "system in the middle": Bad(
        good(9, prompt=talk("user: a", "system: b", "user: c")), "roles_out_of_order", "turn 2 is the system's"
    ),
    "a tool's turn without a call": Bad(
        good(9, prompt=talk("user: a", "tool: b")), "roles_out_of_order", "turn 2 is a tool's, and no tool call"
    ),
    "prompt ends with the assistant": Bad(
        good(9, prompt=talk("user: a", "assistant: b")), "roles_out_of_order", "last turn is the assistant's"
    ),
    "answer of two turns": Bad(
        good(9, chosen=talk("assistant: a", "assistant: b")), "roles_out_of_order", "chosen is more than one turn"
    ),
    "answer ends with the user": Bad(
        good(9, chosen=talk("user: a", "assistant: b", "user: c")), "last_turn_not_assistant", "chosen ends with"
    ),
    "answers to two prompts": Bad(
        good(9, prompt=None, chosen=talk("user: a", "assistant: b"), rejected=talk("user: c", "assistant: d")),
        "prompt_differs",
        "chosen and rejected part before their last turn",
    ),
    # preference
    "chosen scored lower": Bad(
        good(9, margin=None, score_chosen="1", score_rejected="3"), "chosen_scored_lower", "by 2"
    ),
    "strength unknown": Bad(
        good(9, margin=None), "missing_field", "strength is unknown: name its column", {"min_strength": 1.0}
    ),
    "misspelt column": Bad(
        {"promt": "a", "chosen": "b", "rejected": "c"},
        "missing_field",
        "did you mean promt?; the record has the fields promt, chosen, rejected",
    ),
    "strength too small": Bad(good(9, margin=0.5), "below_min_strength", "0.5, at least 1", {"min_strength": 1.0}),
    # tokens
    "end token inside an answer": Bad(good(9, chosen="kind<|im_end|>and"), "end_token_in_answer", "chosen spells"),
    "prompt too long": Bad(good(9, prompt=LONG * 5), "prompt_too_long", "tokens, at most 64"),
    "answer too long": Bad(
        good(9, chosen=LONG), "answer_too_long", "chosen: ", {"answer_truncation": "drop", "max_answer_tokens": 8}
    ),
    "identical after truncation": Bad(
        good(9, chosen=LONG + "a", rejected=LONG + "b"),
        "identical_after_truncation",
        "8 tokens",
        {"max_answer_tokens": 8},
    ),
    # the other records
    "duplicate": Bad(good(1), "duplicate", "of a.jsonl line 1"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_costs_itself_alone(config: RunConfig, tmp_path: Path, name: str) -> None:
    """Its neighbours are used; its rejection names reason, line and what was found."""
    case = BAD_RECORDS[name]
    write(tmp_path, {"a.jsonl": A + case.content + B})

    counts, rejected = prepared(config, tmp_path, path=str(tmp_path / "a.jsonl"), **case.options)

    assert [(row["source"], row["line"], row["reason"]) for row in rejected] == [("a.jsonl", 2, case.reason)]
    assert (counts["used"], counts["pairs/train"], counts[f"rejected/{case.reason}"]) == (2, 2, 1)
    detail = rejected[0]["detail"]
    assert case.detail in detail
    assert not JARGON.search(detail), detail
    assert "\n" not in detail


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def arrow(table: pa.Table, *, stream: bool = False) -> bytes:
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def table(**columns: Any) -> pa.Table:
    """Two rows with a prompt, and what else is given or taken away (None)."""
    given = {"prompt": ["cat", "dog"], "chosen": ["kind", "warm"], "rejected": ["rude", "cold"], **columns}
    return pa.table({name: values for name, values in given.items() if values is not None})


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def ranked(*ranks: float) -> dict[str, Any]:
    return {"prompt": f"cat {ranks}", "answers": [{"answer": f"kind {r} {i}", "rank": r} for i, r in enumerate(ranks)]}


@dataclass(frozen=True)
class Left:
    """Files of which some records are used; ``sources`` are configs whose paths lie in the folder."""

    files: Mapping[str, Content]
    used: int
    rejected: tuple[Place, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "data"
    sources: tuple[Mapping[str, Any], ...] = ()
    detail: str = ""


def one(name: str, content: Content, used: int, *rejected: tuple[int, str], **more: Any) -> Left:
    """One file, which is the source."""
    places = tuple((name, line, reason) for line, reason in rejected)
    return Left({f"data/{name}": content}, used, places, path=f"data/{name}", **more)


CSV = b"prompt,chosen,rejected\n"
ROW = b"cat,kind,rude\n"
OTHER_ROW = b"dog,warm,cold\n"
UTF16 = (A + B).decode().encode("utf-16")
STRUCTS = [talk(*TURNS), talk("user: sea")]
REVERSED = lines(good(1, chosen="rude", rejected="kind"))
UNDECODABLE = "undecodable"

FILES: dict[str, Left] = {
    # ways to write JSON lines
    "byte order mark": one("a.jsonl", b"\xef\xbb\xbf" + A + B, 2),
    "byte order mark of a file that was appended": one("a.jsonl", A + b"\xef\xbb\xbf" + B, 2),
    "CRLF": one("a.jsonl", (A + B).replace(b"\n", b"\r\n"), 2),
    "blank lines": one("a.jsonl", b"\n\n" + A + b"  \r\n\t\n" + b"x\n" + B, 2, (6, UNDECODABLE)),
    "no end of the last line": one("a.jsonl", A + B.strip(), 2),
    "escaped NUL and pairs of surrogates": one("a.jsonl", A.replace(b"cat", b"\\u0000\\ud83d\\ude00"), 1),
    "nested as deep as can be read": one("a.jsonl", lines(good(1, more=json.loads("[" * 200 + "]" * 200))), 1),
    "numbers as text": one("a.jsonl", lines(good(1, margin="2.5"), good(2, score_chosen="3", score_rejected=" 1 ")), 2),
    "ShareGPT": one(
        "a.json",
        json.dumps(
            [
                {
                    "conversations": [{"from": "human", "value": "cat"}],
                    "chosen": {"from": "gpt", "value": "kind"},
                    "rejected": {"from": "gpt", "value": "rude"},
                }
            ]
        ).encode(),
        1,
    ),
    "ndjson": one("a.ndjson", A + B, 2),
    "UTF-16 beside UTF-8": Left(
        {"data/a.jsonl": A, "data/b.jsonl": UTF16},
        1,
        (("b.jsonl", 1, UNDECODABLE), ("b.jsonl", 2, UNDECODABLE), ("b.jsonl", 3, UNDECODABLE)),
        detail="looks like UTF-16",
    ),
    "lone CR as line end": Left(
        {"data/a.jsonl": A, "data/b.jsonl": (B + C).replace(b"\n", b"\r")}, 1, (("b.jsonl", 1, UNDECODABLE),)
    ),
    # compression
    "two members of gzip": one(
        "a.jsonl.gz", gzip.compress(A, mtime=0) + gzip.compress(B + b"x\n", mtime=0), 2, (3, UNDECODABLE)
    ),
    "two frames of zstd": one("a.jsonl.zst", zst(A) + zst(b"x\n" + B), 2, (2, UNDECODABLE)),
    "gzip without its suffix": Left(
        {"data/a.jsonl": A, "data/b.jsonl": gzip.compress(b"", mtime=0)},
        1,
        (("b.jsonl", 1, UNDECODABLE),),
        detail="looks like gzip: name the file .gz",
    ),
    # a schema that changes
    "texts, then messages": one("a.jsonl", A + lines(good(2, prompt=talk(*TURNS))) + C, 3),
    "pairs, then votes": one(
        "a.jsonl", A + B + C + lines(vote(1), vote(2)), 3, (4, "missing_field"), (5, "missing_field")
    ),
    "votes, then pairs": one(
        "a.jsonl", lines(vote(1), vote(2), vote(3)) + A + B, 3, (4, "missing_field"), (5, "missing_field")
    ),
    "votes beyond the sample": one(
        "a.jsonl",
        lines(*map(good, range(70)), *map(vote, range(100))),
        70,
        *((i, "missing_field") for i in range(71, 171)),
    ),
    "text, then numbers": one(
        "a.jsonl", A + lines(good(2, chosen=2), good(3, chosen=3)), 1, (2, "wrong_type"), (3, "wrong_type")
    ),
    # folders
    "file of another format beside": Left(
        {"data/a.jsonl": A + B, "data/b.csv": b"post,comment\nx,y\n"}, 2, (("b.csv", 2, "missing_field"),)
    ),
    "files that are no data beside": Left({"data/a.jsonl": A, "data/readme.md": b"x", "data/.b.jsonl": b"x"}, 1),
    "empty files beside": Left({"data/a.jsonl": A, "data/b.jsonl": b"", "data/c.csv": b"", "data/d.json": b""}, 1),
    "blank file beside": Left({"data/a.jsonl": A, "data/b.jsonl": b"\n \n\r\n"}, 1),
    "link to a good file": Left({"far/x.jsonl": B, "data/a.jsonl": A, "data/b.jsonl": link("../far/x.jsonl")}, 2),
    "link to a file of the same folder": Left(
        {"data/a.jsonl": A, "data/b.jsonl": link("a.jsonl")}, 1, (("b.jsonl", 1, "duplicate"),)
    ),
    "folder named like a file": Left({"data/x.jsonl/a.jsonl": A, "data/b.jsonl": B}, 2),
    "empty folder beside": Left({"data/a.jsonl": A, "data/b.jsonl": Path.mkdir}, 1),
    # .json
    "array": one("a.json", b"[" + A + b"," + B + b"]", 2),
    "one object": one("a.json", json.dumps(good(1), indent=2).encode(), 1),
    "comma behind the last": one("a.json", b"[" + A + b"," + B + b",]", 2, (3, UNDECODABLE), detail="a comma without"),
    "scalars in an array": one(
        "a.json", b"[" + A + b', 1, "a", null]', 1, *((i, "not_an_object") for i in (2, 3, 4)), detail="got a number"
    ),
    "key twice in an array": one("a.json", b'[{"prompt": 1, "prompt": 2},' + A + b"]", 1, (1, UNDECODABLE)),
    "lines in a .json": one("a.json", A + b"x\n" + B, 2, (2, UNDECODABLE)),
    # CSV
    "CSV of a spreadsheet": one("a.csv", b"\xef\xbb\xbf" + (CSV + ROW).replace(b"\n", b"\r\n"), 1),
    "tabs": one("a.tsv", (CSV + ROW + b"a,\n").replace(b",", b"\t"), 1, (3, UNDECODABLE)),
    "cell missing": one(
        "a.csv", CSV + ROW + b"dog,warm\n", 1, (3, UNDECODABLE), detail="a row of 2 cells below a header of 3"
    ),
    "cell too many": one(
        "a.csv", CSV + b"a,b,c,d\n" + ROW, 1, (2, UNDECODABLE), detail="a row of 4 cells below a header of 3"
    ),
    "text behind a quote": one(
        "a.csv", CSV + b'dog,"warm"x,cold\n' + ROW, 1, (2, UNDECODABLE), detail="text behind a closing"
    ),
    "new line in a cell": one("a.csv", CSV + b'"a\nb",kind,rude\n' + b"x\n" + ROW, 2, (4, UNDECODABLE)),
    "empty cells": one(
        "a.csv",
        CSV + ROW + b"dog,,cold\n,kind,rude\ndog,warm,\n",
        1,
        (3, "empty_answer"),
        (4, "empty_prompt"),
        (5, "empty_answer"),
    ),
    "messages as Python prints them": one(
        "a.csv",
        CSV + ROW + b"""dog,"[{'role': 'assistant', 'content': 'a'}]","[{'role': 'assistant', 'content': 'b'}]"\n""",
        1,
        (3, "wrong_type"),
        detail="as Python prints them, expected JSON",
    ),
    # tables
    "Parquet without row groups beside": Left({"data/a.jsonl": A, "data/b.parquet": parquet(table().slice(0, 0))}, 1),
    "messages in Parquet": one("a.parquet", parquet(table(prompt=STRUCTS)), 2),
    "decimals as scores": one(
        "a.parquet", parquet(table(margin=[Decimal("1.50"), Decimal("-1.50")])), 1, (2, "chosen_scored_lower")
    ),
    "nulls in Parquet": one("a.parquet", parquet(table(chosen=["kind", None])), 1, (2, "missing_field")),
    "bytes that are no text": one(
        "a.parquet",
        parquet(table(chosen=pa.array([b"kind", b"\xff"], pa.binary()).view(pa.string()))),
        1,
        (2, UNDECODABLE),
    ),
    "decimals, times and binary as answers": Left(
        {
            "data/a.parquet": parquet(table(chosen=[Decimal("1.5"), Decimal("2.5")])),
            "data/b.parquet": parquet(table(chosen=[datetime(2026, 1, 1, tzinfo=UTC)] * 2)),
            "data/c.arrow": arrow(table(chosen=[b"kind", b"warm"])),
            "data/d.arrow": arrow(table(), stream=True),
        },
        2,
        tuple((name, line, "wrong_type") for name in ("a.parquet", "b.parquet", "c.arrow") for line in (1, 2)),
        detail="chosen is a number, expected text",
    ),
    # preferences
    "ties": one(
        "a.jsonl",
        lines(vote(1), vote(2, "tie"), vote(3, "tie (bothbad)"), vote(4, "model_c")),
        1,
        (2, "tie"),
        (3, "tie"),
        (4, "wrong_type"),
    ),
    "too few answers": one(
        "a.jsonl", lines(ranked(1, 2), ranked(1), ranked(3, 3)), 1, (2, "too_few_answers"), (3, "tie")
    ),
    "contradiction": one(
        "a.jsonl", A + B + REVERSED, 1, (1, "contradiction"), (3, "contradiction"), detail="a.jsonl line 3"
    ),
    "template that refuses": Left(
        {
            "data/a.jsonl": A + lines(good(2, prompt=talk("system: a", "user: b"))),
            "t.jinja": b"{% for m in messages %}"
            b"{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
            b"{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        },
        1,
        (("a.jsonl", 2, "template_refused"),),
        {"chat_template": "t.jinja"},
        detail="no system turn",
    ),
    # several sources, evaluation prompts
    "prompt in two splits": Left(
        {
            "a.jsonl": A + B,
            "b.jsonl": lines(good(1, chosen="warm")),
            "c.jsonl": lines(good(2, chosen="warm")),
            "d.jsonl": C,
        },
        3,
        (("a.jsonl", 1, "prompt_in_heldout"), ("a.jsonl", 2, "prompt_in_validation")),
        sources=(
            {"path": "a.jsonl", "split": "train"},
            {"path": "b.jsonl", "split": "heldout"},
            {"path": "c.jsonl", "split": "validation"},
            {"path": "d.jsonl", "split": "train"},
        ),
    ),
    "overlap with evaluation prompts": Left(
        {
            "data/a.jsonl": A + lines(good(7, prompt="oh why is the sea blue?")),
            "e.txt": b"\nWhy is the sea blue today?\n",
        },
        1,
        (("a.jsonl", 2, "evaluation_overlap"),),
        {"evaluation_prompts": "e.txt", "evaluation_ngram": 4},
        detail="why is the sea",
    ),
    "a selection of rows as datasets saves it": Left(
        {
            "data/dataset_info.json": b"{}",
            "data/state.json": b'{"_data_files": [{"filename": "x.arrow"}]}',
            "data/x.arrow": arrow(table(), stream=True),
            "data/cache.arrow": b"left over",
        },
        2,
    ),
}


def placed(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose files lie in the folder."""
    paths = ("path", "chat_template", "evaluation_prompts")
    return {key: str(folder / value) if key in paths else value for key, value in options.items()}


@pytest.mark.parametrize("name", FILES)
def test_what_can_be_read_is_used_and_the_rest_is_named(config: RunConfig, tmp_path: Path, name: str) -> None:
    """Each record of each file is a pair or a rejection with its line."""
    case = FILES[name]
    write(tmp_path, case.files)
    if case.sources:
        sources = tuple(SourceConfig(**placed(tmp_path, source)) for source in case.sources)
        options: dict[str, Any] = {"path": None, "split": None, "sources": sources}
    else:
        options = placed(tmp_path, {"path": case.path, **case.options})

    counts, rejected = prepared(config, tmp_path, **options)

    assert tuple((row["source"], row["line"], row["reason"]) for row in rejected) == case.rejected
    assert (counts["used"], counts["rejected"]) == (case.used, len(case.rejected))
    assert {row["reason"] for row in rejected} <= set(REASONS)
    if rejected:
        assert case.detail in rejected[0]["detail"]
        assert not any(JARGON.search(row["detail"]) for row in rejected), rejected


@dataclass(frozen=True)
class Refused:
    """Data of which nothing is used, and what the error says, in this order."""

    files: Mapping[str, Content]
    words: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "data"
    sources: tuple[Mapping[str, Any], ...] = ()


def alone(name: str, content: Content, *words: str, **options: Any) -> Refused:
    """One file, which is the source."""
    return Refused({f"data/{name}": content}, words, options, path=f"data/{name}")


def beside(name: str, content: Content, *words: str) -> Refused:
    """The same in a folder with a good file: nothing of the folder is used."""
    return Refused({"data/a.jsonl": A, f"data/{name}": content}, (name, *words))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at:][1:]


MANY = lines(*(good(i, chosen=f"kind {i**9}") for i in range(400)))
TABLE = table(chosen=["kind" * 400, "warm" * 300])
TWICE = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
STATE = b'{"_data_files": [{"filename": "x.arrow"}]}'

REFUSED: dict[str, Refused] = {
    # nothing there
    "path that does not exist": Refused({}, ("There is no data at ", "data.", "prepare.path")),
    "glob without a match": Refused(
        {"data/a.csv": CSV}, ("No data file at ", "*.jsonl", "Expected"), path="data/*.jsonl"
    ),
    "one of two sources is missing": Refused(
        {"a.jsonl": A},
        ("There is no data at ", "b.jsonl", "prepare.sources"),
        sources=({"path": "a.jsonl"}, {"path": "b.jsonl"}),
    ),
    "empty folder": Refused({"data": Path.mkdir}, ("No data file at", "nothing that is not hidden", ".jsonl")),
    "folder named like a file, empty": Refused({"x.jsonl": Path.mkdir}, ("No data file at", "x.jsonl"), path="x.jsonl"),
    "empty file": alone("a.jsonl", b"", "is empty", "at least one record"),
    "only empty files": Refused(
        {"data/a.jsonl": b"", "data/b.csv": b"", "data/c.json.gz": b""}, ("The data at", "is empty")
    ),
    "only blank lines": alone("a.jsonl", b"\n  \n\r\n", "No record in the data"),
    "only a header": alone("a.csv", CSV, "No record in the data"),
    "only an empty array": alone("a.json", b"[]", "No record in the data"),
    "suffix that is not read": alone("a.txt", A, "a.txt is no data file", ".jsonl"),
    "no suffix": alone("pairs", A, "pairs is no data file", ".jsonl"),
    "compressed in another way": beside("b.jsonl.bz2", bz2.compress(B), "gzip or zstd"),
    "another scheme": Refused({}, ("gs://", "s3://"), path="gs://bucket/a.jsonl"),
    # no file
    "dangling link": beside("b.jsonl", link("nowhere"), "cannot be read", "a link to nothing", "remove it"),
    "dangling link as source": alone("a.jsonl", link("nowhere"), "a.jsonl cannot be read", "a link to nothing"),
    "link to itself": alone("a.jsonl", link("a.jsonl"), "a.jsonl cannot be read", "symbolic links"),
    "link that leads back": beside("more", link(".."), "leads back", "remove the link"),
    "pipe": beside("b.jsonl", os.mkfifo, "cannot be read", "a pipe", "a file"),
    "pipe as source": alone("a.jsonl", os.mkfifo, "a.jsonl cannot be read", "a pipe"),
    # damaged as a whole
    "gzip that is cut": beside("b.jsonl.gz", gzip.compress(MANY, mtime=0)[:-300], "is damaged", "compress it again"),
    "gzip with a wrong checksum": beside(
        "b.jsonl.gz", flipped(gzip.compress(B, mtime=0), -8), "is damaged", "whole .gz file"
    ),
    "gzip that is none": beside("b.jsonl.gz", B, "is damaged", "whole .gz file"),
    "zstd that is cut": beside("b.jsonl.zst", zst(MANY)[:-9], "is damaged", "whole .zst file"),
    "zstd that is none": beside("b.jsonl.zst", B, "is damaged", "whole .zst file"),
    "Parquet that is cut": beside("b.parquet", parquet(TABLE)[:-20], "cannot be read", "whole"),
    "Parquet that is none": beside("b.parquet", B, "cannot be read", "whole"),
    "Parquet without row groups": alone("a.parquet", parquet(table().slice(0, 0)), "is empty"),
    "Parquet with two columns of one name": beside(
        "b.parquet", parquet(TWICE), "two columns of one name", "chosen", "rename"
    ),
    "Arrow file that is cut": beside("b.arrow", arrow(TABLE)[:-50], "cannot be read", "whole"),
    "Arrow stream without its end": beside(
        "b.arrow", arrow(TABLE, stream=True)[:-8], "does not end properly", "write it again"
    ),
    "array without its end": beside(
        "b.json", b"[" + A + b"," + B[:20], "is damaged", "after 1 record, at line 2", "begins in line 2", "again"
    ),
    "broken record in an array": beside(
        "b.json", b"[" + A + b', {"prompt": cat},' + B + b"]", "after 1 record, at line 2", "expecting value", "mend"
    ),
    "quote without its end": beside(
        "b.csv", CSV + ROW + b'dog,"warm,cold\n' + OTHER_ROW, "is damaged", "line 3", "a quotation mark opens", "close"
    ),
    # CSV whose every row would be wrong
    "Latin-1 in CSV": beside(
        "b.csv", CSV + ROW + b"caf\xe9,kind,rude\n", "is not UTF-8", "line 3", "byte 0xe9 at position 3", "save it"
    ),
    "semicolons": alone("a.csv", CSV.replace(b",", b";"), "divided by ';'", "prompt;chosen", "commas", "UTF-8"),
    "tabs in a .csv": alone("a.csv", CSV.replace(b",", b"\t"), "divided by", "commas"),
    "commas in a .tsv": alone("a.tsv", CSV + ROW, "divided by ','", "tabs"),
    "no header": alone("a.csv", ROW + OTHER_ROW, "format cannot be recognised", "cat, kind, rude", "fields"),
    "column missing": alone(
        "a.csv", b"prompt,chosen\ncat,kind\n", "format cannot be recognised", "the fields prompt, chosen"
    ),
    "column twice": alone("a.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns of one name", "chosen", "rename"),
    "CSV in UTF-16": alone("a.csv", (CSV + ROW).decode().encode("utf-16"), "is not UTF-8", "UTF-16"),
    "empty first line": alone("a.csv", b"\n" + CSV + ROW, "has no header", "names of the columns"),
    # other data
    "unpaired": alone(
        "a.jsonl",
        lines(*({"prompt": f"a {i}", "completion": "b", "label": bool(i % 2)} for i in range(4))),
        "unpaired preference data",
        "the fields prompt, completion, label",
        "pair good and bad answers",
    ),
    "for supervised fine-tuning": alone(
        "a.jsonl", lines({"instruction": "a", "input": "", "output": "b"}), "supervised fine-tuning"
    ),
    "conversations": alone("a.jsonl", lines({"messages": talk(*TURNS)}), "supervised fine-tuning", "messages"),
    "prompts alone": alone("a.jsonl", lines({"prompt": "a"}, {"prompt": "b"}), "prompts alone", "the fields prompt"),
    "unknown fields": alone(
        "a.jsonl", lines({"q": 1, "better": 2, "worse": 3}), "cannot be recognised", "q, better, worse", "fields:"
    ),
    "records inside an object": alone("a.json", b'{"data": [' + A + b"]}", "cannot be recognised", "the fields data"),
    "texts that hold their prompt": alone(
        "a.jsonl",
        lines({"chosen": "cat is kind", "rejected": "cat is rude"}),
        "No training pair is left of 1 record",
        "missing_field",
        "texts without turns",
    ),
    "nothing but scalars": alone("a.jsonl", b"1\n2\n", "cannot be recognised", "2 records, none of them an object"),
    "nothing that can be decoded": alone(
        "a.jsonl", b"x\ny\nz\n", "No training pair is left of 3 records", "undecodable"
    ),
    "array in a .jsonl": alone("a.jsonl", lines([good(1), good(2)]), "this is a JSON array", "name it .json"),
    "misspelt columns": alone(
        "a.jsonl", lines({"promt": "a", "Chosen": "b", "rejected": "c"}), "did you mean", "promt"
    ),
    "lone CR throughout": alone(
        "a.jsonl", (A + B).replace(b"\n", b"\r"), "No training pair is left of 1 record", "undecodable"
    ),
    "UTF-16 throughout": alone("a.jsonl", UTF16, "No training pair is left of 3 records", "undecodable", "UTF-16"),
    "UTF-16 in a .json": alone(
        "a.json", (b"[" + A + b"]").decode().encode("utf-16"), "is damaged", "looks like UTF-16"
    ),
    "all rejected": alone(
        "a.jsonl",
        lines(*(good(i, rejected="kind") for i in range(3))),
        "No training pair is left of 3 records",
        "3 identical_answers",
        "a.jsonl",
        "a better and a worse answer",
    ),
    "all held out": alone("a.jsonl", A, "No training pair is left of 1 record", "1 pair", split="heldout"),
    # what the config says of the data
    "column that does not exist": alone(
        "a.jsonl",
        A + B,
        "No training pair is left of 2 records",
        "missing_field",
        "no value for worse",
        fields={"prompt": "prompt", "chosen": "chosen", "rejected": "worse"},
    ),
    "misspelt target": alone(
        "a.jsonl",
        A,
        "fields maps what the format pairs does not have",
        "choosen",
        "prompt, chosen, rejected",
        fields={"choosen": "chosen"},
    ),
    "group key nowhere": alone(
        "a.jsonl", A + B, "No training pair", "missing_field", "no value for film", group_key="film"
    ),
    "another format than the data's": alone(
        "a.jsonl", A, "No training pair", "missing_field", "human_ref_A", format="shp"
    ),
    "no evaluation file": Refused(
        {"data/a.jsonl": A}, ("e.txt cannot be read", "prepare.evaluation_prompts"), {"evaluation_prompts": "e.txt"}
    ),
    "empty evaluation file": Refused(
        {"data/a.jsonl": A, "e.txt": b"\n\n"},
        ("The evaluation prompts in", "are empty", "a prompt a line"),
        {"evaluation_prompts": "e.txt"},
    ),
    "evaluation file of another kind": Refused(
        {"data/a.jsonl": A, "e.parquet": parquet(TABLE)},
        ("e.parquet cannot be read", ".parquet", ".jsonl"),
        {"evaluation_prompts": "e.parquet"},
    ),
    "broken evaluation file": Refused(
        {"data/a.jsonl": A, "e.jsonl": b'{"prompt": "a"}\n{"question": "b"}\n'},
        ("e.jsonl, line 2 has no prompt", "question"),
        {"evaluation_prompts": "e.jsonl"},
    ),
    # folders that datasets saved
    "split that is not saved": Refused(
        {"data/dataset_dict.json": b'{"splits": ["test"]}'}, ("has no split 'train'", "test", "prepare.hub_split")
    ),
    "description of the splits is broken": Refused(
        {"data/dataset_dict.json": b"{"}, ("dataset_dict.json at", "is broken", "save")
    ),
    "state is broken": Refused(
        {"data/dataset_info.json": b"{}", "data/state.json": b'{"_data_files": [{}]}'},
        ("state.json at", "is broken", "save"),
    ),
    "state is of another kind": Refused(
        {"data/dataset_info.json": b"{}", "data/state.json": b"[]"}, ("state.json at", "is broken", "save")
    ),
    "saved file is gone": Refused(
        {"data/dataset_info.json": b"{}", "data/state.json": STATE}, ("x.arrow cannot be read", "no such file")
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_data_is_refused_in_one_line(config: RunConfig, tmp_path: Path, name: str) -> None:
    """What happened, what was found, what was expected and what to do; no output is left that counts as complete."""
    case = REFUSED[name]
    write(tmp_path, case.files)
    if case.sources:
        sources = tuple(SourceConfig(**placed(tmp_path, source)) for source in case.sources)
        options: dict[str, Any] = {"path": None, "sources": sources}
    else:
        path = case.path if "://" in case.path else str(tmp_path / case.path)
        options = {**placed(tmp_path, case.options), "path": path}

    with pytest.raises((DataError, ConfigError)) as caught:
        prepared(config, tmp_path, **options)

    message = told(caught.value)
    assert re.search(".*".join(map(re.escape, case.words)), message), message
    assert not list(tmp_path.rglob("record.json"))


SOURCES = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
CONFIGS: dict[str, tuple[Mapping[str, Any], str]] = {
    "unknown format": ({"format": "sharegpt"}, r"'prepare\.format' should be 'auto', 'pairs', .*, got 'sharegpt'"),
    "path and sources": ({"sources": SOURCES}, r"prepare\.path or prepare\.sources, and only one of them"),
    "neither path nor sources": ({"path": None}, r"prepare\.path or prepare\.sources, and only one of them"),
    "some with weights": (
        {"path": None, "sources": [{**SOURCES[0], "weight": 1.0}, SOURCES[1]]},
        "either every source has a weight or none",
    ),
    "weight of the only source": ({"weight": 2.0}, r"prepare\.weight has no meaning without other sources"),
    "weight of nothing": (
        {"path": None, "sources": [{**SOURCES[0], "weight": 0}]},
        r"'prepare\.sources\.0\.weight' should be greater than 0, got 0",
    ),
    "source without a path": (
        {"path": None, "sources": [{"format": "hh"}]},
        r"'prepare\.sources\.0\.path' is required",
    ),
    "misspelt key of a source": (
        {"path": None, "sources": [{**SOURCES[0], "wieght": 1.0}]},
        r"unknown key 'prepare\.sources\.0\.wieght'",
    ),
    "unknown split": ({"split": "test"}, r"'prepare\.split' should be 'train', 'validation' or 'heldout', got 'test'"),
    "negative strength": (
        {"min_strength": -1},
        r"'prepare\.min_strength' should be greater than or equal to 0, got -1",
    ),
    "fields as a list": ({"fields": ["prompt"]}, r"'prepare\.fields' should be an object"),
    "address of another kind": ({"path": "gs://bucket/a.jsonl"}, r"gs://bucket/a\.jsonl"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_cannot_be_meant_is_refused(config: RunConfig, tmp_path: Path, name: str) -> None:
    """Before anything is read: the key, what was written, and what may be."""
    changes, words = CONFIGS[name]
    shutil.copytree(config.model.path, tmp_path / "model")

    with pytest.raises(ConfigError, match=words) as caught:
        tiny_config(tmp_path, **{f"prepare__{key}": value for key, value in changes.items()})

    assert "\n" not in str(caught.value)
    assert not JARGON.search(str(caught.value))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_record_that_is_too_large_costs_itself_alone(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """5,000 bytes where 1,000 are allowed."""
    monkeypatch.setattr(base, "MAX_RECORD_BYTES", 1000)
    records = [good(1), good(2, chosen="kind " * 1000), good(3)]
    rows = b"".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\n".encode() for r in records)
    contents = {
        "a.jsonl": lines(*records),
        "a.jsonl.gz": gzip.compress(lines(*records), mtime=0),
        "a.json": json.dumps(records).encode(),
        "a.csv": CSV + rows,
        "a.parquet": parquet(pa.Table.from_pylist(records)),
    }
    write(tmp_path, {name: contents[name]})

    counts, rejected = prepared(config, tmp_path, path=str(tmp_path / name))

    line = 3 if name == "a.csv" else 2
    assert [(row["line"], row["reason"]) for row in rejected] == [(line, "record_too_large")]
    assert re.search(r"\d+ bytes, at most 1000 are read", rejected[0]["detail"])
    assert counts["used"] == 2


def test_one_file_may_be_renamed_but_not_read_in_another_way(tmp_path: Path) -> None:
    """Its name is no content, its suffix says how it is read; in a folder or behind a glob names tell files apart."""
    write(tmp_path, {"a.jsonl": A, "moved/b.ndjson": A, "moved/b.json": A, "moved/b.jsonl": B})

    def digest(path: str) -> str:
        return source_digest(SourceConfig(path=f"{tmp_path}/{path}"))

    assert digest("a.jsonl") == digest("moved/b.ndjson")
    assert len({digest(path) for path in ("a.jsonl", "moved/b.json", "moved/b.jsonl", "moved", "*.jsonl")}) == 5


@pytest.mark.slow
def test_line_of_100_megabytes_costs_itself_alone(config: RunConfig, tmp_path: Path) -> None:
    """A file that lost its line ends somewhere. No more than the largest record is held: 32 MB and some."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(A + b'{"prompt": "')
        for _ in range(100):
            stream.write(b"kind" * 250_000)
        stream.write(b'"}\n' + B)
    tracemalloc.start()
    try:
        counts, rejected = prepared(config, tmp_path, path=str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(row["line"], row["reason"]) for row in rejected] == [(2, "record_too_large")]
    assert rejected[0]["detail"] == "100000015 bytes, at most 33554432 are read"
    assert counts["used"] == 2
    assert peak < 90e6


def test_no_permission_is_refused() -> None:
    """Where tests run as root, a child that is not root looks; it could not read the fixtures' model either."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        write(folder, {"a.jsonl": A})
        (folder / "a.jsonl").chmod(0)
        message = _as_another_user(lambda: source_digest(SourceConfig(path=str(folder / "a.jsonl"))))
    finally:
        shutil.rmtree(folder)
    assert message == f"{folder}/a.jsonl cannot be read. Got: no permission. What to do: make it readable."


def _as_another_user(work: Callable[[], object]) -> str:
    """The error's message of some work in a child process that is not root."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        message = "no error"
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            work()
        except BaseException as error:
            message = str(error) if isinstance(error, DataError) else f"unexpected: {error!r}"
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        return stream.read().decode()


def test_command_line_says_it_in_one_line(config: RunConfig, tmp_path: Path) -> None:
    """Exit code 2 and the message, for data that is not there, damaged, or of another kind; no traceback."""
    unpaired = lines(*({"prompt": f"a {i}", "completion": "b", "label": True} for i in range(3)))
    write(tmp_path, {"cut.jsonl.gz": gzip.compress(MANY, mtime=0)[:-300], "kto.jsonl": unpaired})
    wanted = {
        "nowhere.jsonl": "There is no data at",
        "cut.jsonl.gz": "cut.jsonl.gz is damaged",
        "kto.jsonl": "This is unpaired preference data",
    }

    def run(name: str) -> Finished:
        section = replace(config.prepare, path=str(tmp_path / name), group_key=None)
        tracking = replace(config.tracking, uri=f"sqlite:///{tmp_path / name}.db")
        changed = replace(config, store=str(tmp_path / f"store-{name}"), prepare=section, tracking=tracking)
        return dpo("prepare", str(write_config(changed, tmp_path / f"{name}.yaml")))

    with ThreadPoolExecutor(2) as pool:
        finished = dict(zip(wanted, pool.map(run, wanted), strict=True))

    for name, words in wanted.items():
        assert finished[name].code == 2, finished[name].output
        said = [line for line in finished[name].output.splitlines() if words in line]
        assert len(said) == 1, finished[name].output
        assert "What to do: " in said[0]
        assert "Traceback" not in finished[name].output
