"""Whole files and folders of which something is left."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_train.config import RunConfig, SourceConfig
from dpo_train.data.formats import REASONS
from tests.unit.stages.bad_data.cases import (
    CSV,
    JARGON,
    REVERSED,
    ROW,
    STRUCTS,
    TURNS,
    UNDECODABLE,
    UTF16,
    A,
    B,
    C,
    Left,
    arrow,
    good,
    lines,
    link,
    one,
    parquet,
    placed,
    prepared,
    ranked,
    table,
    talk,
    vote,
    write,
    zst,
)

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
