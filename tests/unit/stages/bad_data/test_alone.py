"""What wants more than a file: size, permission, identity, the command line."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_train.config import RunConfig, SourceConfig
from dpo_train.data.sources import base, source_digest
from dpo_train.errors import DataError
from tests.command import Finished, dpo, write_config
from tests.unit.stages.bad_data.cases import (
    CSV,
    MANY,
    A,
    B,
    good,
    lines,
    parquet,
    prepared,
    write,
)


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
