"""Objects on a real server without faults, and what is said to who may not."""

from __future__ import annotations

import io
import multiprocessing
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_train import storage
from dpo_train.errors import DiskFullError, StorageUnavailableError, StoreError
from dpo_train.storage import Mirror, Options, objects
from tests.s3.proxy import Proxy
from tests.s3.server import Server

LARGE = random.Random(7).randbytes(17 * 1024 * 1024)  # more than one request takes: 3 parts, the last of 1 MB


def test_an_object_comes_back_as_it_was_written(direct: Server) -> None:
    """Also an empty one, and one whose key holds what means something elsewhere."""
    bucket = direct.bucket("roundtrip")
    for key, content in {"a/b.bin": bytes(range(256)), "empty": b"", "odd/x y?v=1#z%20+&.txt": "ä".encode()}.items():
        path = storage.join(bucket, key)
        storage.write_bytes(path, content)

        assert storage.read_bytes(path) == content
        entry = storage.info(path)
        assert entry is not None
        assert (entry.path, entry.size) == (path, len(content))
        assert direct.objects("roundtrip")[key] == content


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (3, None), (0, 4), (3, 7), (9, 10), (5, 99), (10, 20), (50, 60), (4, 4), (6, 2)]
)
def test_a_range_is_what_a_slice_would_be(direct: Server, start: int, stop: int | None) -> None:
    """Of ten bytes, also where the range reaches beyond the end, lies behind it or is empty."""
    path = direct.bucket("ranges") + "/ten"
    storage.write_bytes(path, b"0123456789")

    assert storage.read_bytes(path, start, stop) == b"0123456789"[start:stop]


def test_what_is_not_there_is_none_or_an_error(direct: Server) -> None:
    """``info`` asks whether; reading takes it for granted."""
    bucket = direct.bucket("absent")

    assert storage.info(bucket + "/none") is None
    assert storage.list_files(bucket + "/none") == []
    assert storage.glob(bucket + "/none/*") == []
    storage.delete([bucket + "/none"])
    with pytest.raises(StoreError, match=r"Cannot read s3://absent/none: the object does not exist"):
        storage.read_bytes(bucket + "/none")
    with pytest.raises(StoreError, match=r"There is no object s3://absent/none"):
        storage.open_input(bucket + "/none")


def test_a_folder_is_listed_with_all_below_it_and_nothing_beside_it(
    direct: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted, across pages of the listing, without the marks that some tools leave for folders."""
    bucket = direct.bucket("listing")
    s3 = direct.client()
    for key in ("data/b/2", "data/a", "data/", "data/b/1", "data.txt", "database/x", "other"):
        s3.put_object(Bucket="listing", Key=key, Body=b"" if key.endswith("/") else b"x" * len(key))
    pages: list[int] = []
    ask = objects.ask

    def two_at_a_time(action: str, path: str, question: Callable[..., object]) -> object:
        async def smaller(client: object) -> object:
            class Client:
                async def list_objects_v2(self, **arguments: object) -> object:
                    pages.append(1)
                    return await client.list_objects_v2(**arguments, MaxKeys=2)  # type: ignore[attr-defined]

            return await question(Client())  # type: ignore[misc]

        return ask(action, path, smaller)

    monkeypatch.setattr(objects, "ask", two_at_a_time)

    found = storage.list_files(bucket + "/data")
    assert [(entry.path, entry.size) for entry in found] == [
        ("s3://listing/data/a", 6),
        ("s3://listing/data/b/1", 8),
        ("s3://listing/data/b/2", 8),
    ]
    assert len(pages) == 2
    assert storage.list_files(bucket + "/data/") == found
    assert len(storage.list_files(bucket)) == 6


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("d/*.jsonl", ["d/a.jsonl", "d/b.jsonl"]),
        ("d/**/*.jsonl", ["d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]),
        ("d/?.jsonl", ["d/a.jsonl", "d/b.jsonl"]),
        ("d/[b-z].*", ["d/b.jsonl", "d/b.txt"]),
        ("*/e/*", ["d/e/c.jsonl"]),
        ("d/a.jsonl", ["d/a.jsonl"]),
        ("d/*.csv", []),
    ],
)
def test_a_glob_finds_what_it_would_find_on_disk(direct: Server, pattern: str, keys: list[str]) -> None:
    """``*`` stops at a slash, ``**`` does not."""
    bucket = direct.bucket("globs")
    for key in ("d/a.jsonl", "d/b.jsonl", "d/b.txt", "d/e/c.jsonl", "f"):
        storage.write_bytes(storage.join(bucket, key), b"")

    assert [entry.path.removeprefix(bucket + "/") for entry in storage.glob(storage.join(bucket, pattern))] == keys


def test_a_pattern_that_means_nothing_is_refused(direct: Server) -> None:
    """``**`` within a name."""
    with pytest.raises(StoreError, match=r"The pattern s3://globs/a\*\* is not valid"):
        storage.glob(direct.bucket("globs") + "/a**")


def test_a_large_file_goes_up_in_parts_and_comes_down_in_blocks(
    proxied: Proxy, s3_server: Server, tmp_path: Path
) -> None:
    """17 MB: three parts, three blocks, nothing unfinished and no temporary file left."""
    bucket = s3_server.bucket("large")
    source = tmp_path / "source.bin"
    source.write_bytes(LARGE)

    storage.upload(source, bucket + "/large.bin")
    assert proxied.count("PUT", r"/large/large\.bin\?.*partNumber=") == 3
    storage.download(bucket + "/large.bin", tmp_path / "new" / "target.bin")

    assert (tmp_path / "new" / "target.bin").read_bytes() == LARGE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target.bin"]
    assert s3_server.unfinished("large") == []
    entry = storage.info(bucket + "/large.bin")
    assert entry is not None
    assert entry.etag.endswith("-3")


def test_a_stream_reads_ranges_and_seeks(proxied: Proxy, s3_server: Server) -> None:
    """Ten bytes in blocks of four; what was read is not asked for again."""
    path = s3_server.bucket("stream") + "/ten"
    storage.write_bytes(path, b"0123456789")
    with storage.open_input(path, block=4) as stream:
        assert stream.read(2) == b"01"
        assert stream.read(2) == b"23"
        assert [seen.headers.get("Range") for seen in proxied.seen if seen.method == "GET"] == [
            "bytes=0-0",
            "bytes=0-3",
        ]
        assert stream.read() == b"456789"
        assert stream.seek(-3, io.SEEK_END) == 7
        assert stream.read(1) == b"7"
        assert stream.seek(1) == 1
        assert stream.read(100) == b"123456789"
        assert stream.read(1) == b""
        assert stream.seekable()
        with pytest.raises(ValueError, match="negative"):
            stream.seek(-1)
    with storage.open_input(path, block=4) as stream:
        assert list(stream) == [b"0123456789"]


def test_an_object_replaced_while_it_is_read_is_noticed(direct: Server) -> None:
    """Two halves of two versions are never one content, even of the same size."""
    path = direct.bucket("replaced") + "/ten"
    storage.write_bytes(path, b"0123456789")
    with storage.open_input(path, block=5) as stream:
        assert stream.read(5) == b"01234"
        storage.write_bytes(path, b"abcdefghij")
        with pytest.raises(StoreError, match="replaced while it was being read"):
            stream.read(5)


def test_deleted_objects_are_gone(direct: Server) -> None:
    """These and no others."""
    bucket = direct.bucket("deletion")
    for key in "abc":
        storage.write_bytes(f"{bucket}/{key}", b"x")

    storage.delete([f"{bucket}/a", f"{bucket}/c"])

    assert list(direct.objects("deletion")) == ["b"]


def test_a_mirror_brings_files_home_and_back(direct: Server, tmp_path: Path) -> None:
    """Another machine's copy is filled as its files are asked for; a copy of another size is replaced."""
    home = direct.bucket("mirror") + "/stage/digest"
    here, there = Mirror(home, tmp_path / "here"), Mirror(home, tmp_path / "there")
    for name in ("record.json", "shards/0", "shards/1"):
        (here.path / name).parent.mkdir(parents=True, exist_ok=True)
        (here.path / name).write_text(name)

    here.publish("shards/0", "shards/1")
    here.publish("record.json")

    assert there.fetch("shards/1", size=8).read_text() == "shards/1"
    assert not (there.path / "shards" / "0").exists()
    (there.path / "record.json").write_text("old")
    assert there.fetch("record.json").read_text() == "old"
    assert there.fetch("record.json", size=11).read_text() == "record.json"
    with pytest.raises(
        StoreError, match=r"record.json has another size than when it was made. Got: 11 bytes. Expected: 12"
    ):
        there.fetch("record.json", size=12)
    with pytest.raises(StoreError, match=r"There is no object .*/shards/2"):
        there.fetch("shards/2")
    assert sorted(direct.objects("mirror")) == [
        f"stage/digest/{name}" for name in ("record.json", "shards/0", "shards/1")
    ]


def test_a_forked_child_has_a_client_of_its_own(direct: Server) -> None:
    """The parent's event loop does not live in the child; parent and child both go on."""
    path = direct.bucket("fork") + "/x"
    storage.write_bytes(path, b"parent")
    child = multiprocessing.get_context("fork").Process(target=storage.write_bytes, args=(path, b"child"))
    child.start()
    child.join(20)

    assert child.exitcode == 0
    assert storage.read_bytes(path) == b"child"


def test_region_and_endpoint_come_from_options_or_environment(
    s3_server: Server, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options win; the environment's change is noticed without a new process."""
    path = s3_server.bucket("regions") + "/x"

    def scope() -> str:
        assert storage.info(path) is None
        return s3_proxy.seen[-1].headers["Authorization"].split("/")[2]

    for name, value in s3_proxy.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert scope() == "eu-north-1"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "ca-west-1")
    assert scope() == "ca-west-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storage.use(Options(endpoint=s3_proxy.endpoint, region="sa-east-1"))
    assert scope() == "sa-east-1"


def test_anonymous_requests_are_not_signed(proxied: Proxy, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials are needed, and those that there are do not leave this machine."""
    path = s3_server.bucket("public") + "/x"
    storage.write_bytes(path + "y", b"closed")
    assert "Authorization" in proxied.seen[-1].headers
    s3_server.client().put_object(Bucket="public", Key="x", Body=b"open", ACL="public-read")
    storage.use(Options(anonymous=True))
    assert storage.read_bytes(path) == b"open"
    assert "Authorization" not in proxied.seen[-1].headers
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert storage.read_bytes(path) == b"open"
    with pytest.raises(StoreError, match=r"Cannot read s3://public/xy: access is denied.*storage\.anonymous: false"):
        storage.read_bytes(path + "y")


def _refused(path: str, *, write: bool) -> str:
    with pytest.raises(StoreError) as caught:
        storage.check_access(path, write=write)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_bucket_is_said_in_one_line(direct: Server) -> None:
    """Before anything slow starts, whether it is to be read or written."""
    for write in (False, True):
        assert _refused("s3://never-made/store", write=write).startswith(
            "Cannot read s3://never-made/store: the bucket does not exist. What to do: "
        )
    with pytest.raises(StoreError, match="bucket does not exist"):
        storage.info("s3://never-made/x")
    with pytest.raises(StoreError, match="Cannot write s3://never-made/x: the bucket does not exist"):
        storage.write_bytes("s3://never-made/x", b"")


def test_missing_credentials_are_said_in_one_line(direct: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables to set, and the option for a public bucket."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    said = _refused(direct.bucket("private") + "/x", write=False)

    assert "there are no credentials" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert "storage.anonymous: true" in said


def test_wrong_keys_are_said_in_one_line_without_them(direct: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server checks every signature: an unknown access key, and a known one with another's secret."""
    bucket = direct.bucket("signed")
    keys = direct.user("signer", "s3:*")
    with direct.enforcing():
        said = _refused(bucket, write=False)
        assert "the server does not know this access key" in said
        assert "test-key" not in said
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        storage.check_access(bucket, write=True)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        said = _refused(bucket, write=True)
        assert "the secret key does not belong to the access key" in said
        assert "wrong-secret" not in said
        assert keys["AWS_ACCESS_KEY_ID"] not in said


def test_missing_permissions_are_named(direct: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may read but not write, who may read single objects but not list, and who may nothing."""
    path = direct.bucket("guarded") + "/x"
    storage.write_bytes(path, b"secret")
    reader, getter, nobody = (
        direct.user("reader", "s3:GetObject", "s3:ListBucket"),
        direct.user("getter", "s3:GetObject"),
        direct.user("nobody"),
    )

    def become(keys: dict[str, str]) -> None:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)

    with direct.enforcing():
        become(reader)
        storage.check_access(path, write=False)
        assert "s3:PutObject" in _refused(path, write=True)
        become(getter)
        storage.check_access(path, write=False)
        assert storage.read_bytes(path) == b"secret"
        become(nobody)
        said = _refused(path, write=False)
    assert said.startswith("Cannot read s3://guarded/x: access is denied. Got: AccessDenied (403)")


def test_checking_access_leaves_nothing_behind(direct: Server) -> None:
    """Neither an object nor an unfinished upload; the folder need not exist, and a glob will do."""
    bucket = direct.bucket("checked")

    for path in (bucket, bucket + "/store/", bucket + "/data/*.jsonl"):
        storage.check_access(path, write="*" not in path)

    assert direct.objects("checked") == {}
    assert direct.unfinished("checked") == []


def test_a_server_that_is_not_there_is_said_after_two_attempts(direct: Server) -> None:
    """Not the user's mistake for certain: exit code 1, with the address."""
    storage.use(Options(endpoint="http://127.0.0.1:1", attempts=50))

    with pytest.raises(StorageUnavailableError, match=r"Could not read s3://b/x at http://127.0.0.1:1 in 2 attempts"):
        storage.check_access("s3://b/x", write=False)


def test_local_files_that_cannot_be_written_or_read_are_named(direct: Server, tmp_path: Path) -> None:
    """A file where the folder should be, and a source that is not there."""
    path = direct.bucket("disk") + "/x"
    storage.write_bytes(path, b"content")
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StoreError, match=r"Cannot write .*file/x: .*storage\.cache or DPO_CACHE"):
        storage.download(path, tmp_path / "file" / "x")
    with pytest.raises(StoreError, match=r"Cannot read .*nothing"):
        storage.upload(tmp_path / "nothing", path)


def test_a_full_disk_is_said_and_nothing_is_left(direct: Server, tmp_path: Path) -> None:
    """A megabyte onto a real file system of 64 KiB: how much does not fit where, and no temporary file."""
    path = direct.bucket("disk") + "/x"
    storage.write_bytes(path, bytes(1 << 20))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not possible here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(DiskFullError, match=r"s3://disk/x \(1048576 bytes\) does not fit into .*free some space"):
            storage.download(path, tmp_path / "x")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
