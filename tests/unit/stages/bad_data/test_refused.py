"""Data of which nothing can be used, and configs that cannot be meant: one line, exit code 2."""

from __future__ import annotations

import bz2
import gzip
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_train.config import RunConfig, SourceConfig
from dpo_train.errors import ConfigError, DataError
from tests.tiny import tiny_config
from tests.unit.stages.bad_data.cases import (
    CSV,
    JARGON,
    MANY,
    OTHER_ROW,
    ROW,
    TURNS,
    UTF16,
    A,
    B,
    Content,
    arrow,
    good,
    lines,
    link,
    parquet,
    placed,
    prepared,
    table,
    talk,
    told,
    write,
    zst,
)


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
