"""The same sources in a bucket, over HTTP and with faults on the way."""

from __future__ import annotations

import gzip
from pathlib import Path
from unittest import mock

import pytest

from dpo_train import storage
from dpo_train.config import SourceConfig
from dpo_train.data.sources import base, plan, source_digest
from dpo_train.errors import DataError, StoreError
from tests.s3.proxy import Proxy
from tests.s3.server import Server
from tests.unit.data.test_sources import WRITERS, jsonl, numbered, read
from tests.unit.data.test_sources_finding import _save, names

RECORDS = [
    {"prompt": [{"role": "user", "content": f"question {i}"}], "chosen": "yes " * i, "note": None, "score": i / 3}
    for i in range(60)
]


def _put(bucket: str, folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            storage.upload(file, f"{bucket}/{file.relative_to(folder).as_posix()}")


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_from_a_bucket(direct: Server, tmp_path: Path, name: str) -> None:
    """The same records, lines and number of blocks as from the local file (an Arrow stream is one block)."""
    WRITERS[name](tmp_path / name, RECORDS)
    bucket = direct.bucket("sources")
    _put(bucket, tmp_path)
    with mock.patch.object(base, "BLOCK_BYTES", 1500):
        assert read(f"{bucket}/{name}") == read(tmp_path / name) == numbered(RECORDS)
        local, remote = (plan(SourceConfig(path=path), 0) for path in (str(tmp_path / name), f"{bucket}/{name}"))
    assert len(remote) == (1 if name == "stream.arrow" else len(local))
    assert (len(remote) > 3) == (name in {"a.jsonl", "escaped.jsonl", "crlf.jsonl", "a.parquet", "file.arrow"})


def test_prefixes_and_globs(direct: Server, tmp_path: Path) -> None:
    """A prefix is a folder; names are relative to it; hidden and other objects are left alone."""
    for name in ("set/b.jsonl", "set/sub/a.jsonl", "set/.hidden.jsonl", "set/notes.txt", "settee/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([{"n": 1}]))
    bucket = direct.bucket("sources")
    _put(bucket, tmp_path)
    assert names(f"{bucket}/set") == names(f"{bucket}/set/") == ["b.jsonl", "sub/a.jsonl"]
    assert names(f"{bucket}/set/b.jsonl") == ["b.jsonl"]
    assert names(f"{bucket}/*/*.jsonl") == ["set/b.jsonl", "settee/c.jsonl"]
    assert names(f"{bucket}/set/**/*.jsonl") == ["b.jsonl", "sub/a.jsonl"]
    assert names(bucket) == ["set/b.jsonl", "set/sub/a.jsonl", "settee/c.jsonl"]


def test_a_saved_data_set_is_read_from_a_bucket(direct: Server, tmp_path: Path) -> None:
    """In its own order; a file that was not copied is an error."""
    _save(tmp_path / "set/train", ["a", "b", "c"])
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train"]}')
    bucket = direct.bucket("sources")
    _put(bucket, tmp_path)
    assert [value["n"] for _, value in read(f"{bucket}/set")] == ["a", "b", "c"]
    storage.delete([f"{bucket}/set/train/data-1.arrow"])
    with pytest.raises(DataError, match=r"not whole.*data-1\.arrow"):
        read(f"{bucket}/set")


def test_nothing_usable_is_said(direct: Server) -> None:
    """No object, only other ones, no bucket."""
    bucket = direct.bucket("sources")
    with pytest.raises(DataError, match="There is no data at s3://sources/absent"):
        plan(SourceConfig(path=f"{bucket}/absent"), 0)
    storage.write_bytes(f"{bucket}/set/notes.txt", b"notes")
    with pytest.raises(DataError, match=r"No data file at s3://sources/set.*notes\.txt"):
        plan(SourceConfig(path=f"{bucket}/set"), 0)
    with pytest.raises(DataError, match=r"No data file at"):
        plan(SourceConfig(path=f"{bucket}/set/notes.txt"), 0)
    with pytest.raises(StoreError, match="no-such-bucket"):
        plan(SourceConfig(path="s3://no-such-bucket/set"), 0)


def test_damage_is_a_data_error(direct: Server, tmp_path: Path) -> None:
    """As it is for a local file."""
    bucket = direct.bucket("sources")
    storage.write_bytes(f"{bucket}/a.jsonl.gz", gzip.compress(jsonl(RECORDS), mtime=0)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged"):
        read(f"{bucket}/a.jsonl.gz")
    WRITERS["stream.arrow"](tmp_path / "stream.arrow", RECORDS)
    storage.write_bytes(f"{bucket}/a.arrow", (tmp_path / "stream.arrow").read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.arrow cannot be read: its Arrow stream does not end"):
        read(f"{bucket}/a.arrow")
    storage.write_bytes(f"{bucket}/a.parquet", b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read(f"{bucket}/a.parquet")


def test_digest_follows_the_objects(direct: Server) -> None:
    """The same below another prefix; another when an object changes, without its being read."""
    bucket = direct.bucket("sources")

    def digest(prefix: str) -> str:
        return source_digest(SourceConfig(path=f"{bucket}/{prefix}"))

    for prefix in ("one", "two"):
        storage.write_bytes(f"{bucket}/{prefix}/a.jsonl", b'{"n": 1}')
    before = digest("one")
    assert before == digest("two")
    storage.write_bytes(f"{bucket}/two/a.jsonl", b'{"n": 2}')
    assert before != digest("two")


def test_resets_in_the_middle_lose_nothing(proxied: Proxy, s3_server: Server, tmp_path: Path) -> None:
    """Connections are reset in the middle of bodies; every record comes once."""
    bucket = s3_server.bucket("sources")
    for name in ("a.jsonl", "a.jsonl.gz"):
        WRITERS[name](tmp_path / name, RECORDS)
    _put(bucket, tmp_path)
    for name in ("a.jsonl", "a.jsonl.gz"):
        proxied.fault("GET", name, "reset", 2)
        with mock.patch.object(base, "BLOCK_BYTES", 3000):
            assert read(f"{bucket}/{name}") == numbered(RECORDS)
        assert proxied.count("GET", name, "reset") == 2
