"""Broken input, and what the tests of it share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train.config import RunConfig
from dpo_train.errors import DpoError
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess

Content = bytes | Callable[[Path], object]
Place = tuple[str, int, str]
"""File, line and reason of a rejection."""

# Words that only programmers know.
JARGON = re.compile(
    r"NoneType|\b(dict|str|int|float|bool|tuple|codec|mappingproxy|datetime|errno)\b|Traceback|Exception|Error\b"
    r"|object at 0x|recursion|set_int_max",
    re.IGNORECASE,
)


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
MANY = lines(*(good(i, chosen=f"kind {i**9}") for i in range(400)))


def placed(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose files lie in the folder."""
    paths = ("path", "chat_template", "evaluation_prompts")
    return {key: str(folder / value) if key in paths else value for key, value in options.items()}
