"""Every fault between us and the server: tried again and right afterwards, or bounded and said; no half output."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_train import storage
from dpo_train.errors import StorageUnavailableError, StoreError
from dpo_train.storage import Mirror, Options, client, objects
from tests.s3.proxy import Kind, Proxy
from tests.s3.server import Server

CONTENT = random.Random(1).randbytes(3_000_000)
LARGE = random.Random(2).randbytes(17 * 1024 * 1024)  # three parts


@pytest.fixture
def bucket(s3_server: Server, proxied: Proxy) -> str:
    """An empty bucket, reached through the proxy."""
    return s3_server.bucket("faults")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server is given up after 0.6 s instead of 30."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.6)


READ_FAULTS: tuple[Kind, ...] = ("slow_down", "internal_error", "refuse", "reset", "truncate", "lost_answer")


@pytest.mark.parametrize("kind", READ_FAULTS)
def test_a_read_that_fails_twice_is_right_the_third_time(
    s3_server: Server, proxied: Proxy, bucket: str, kind: Kind
) -> None:
    """Three requests, and all the bytes."""
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    proxied.fault("GET", r"/faults/x$", kind, 2)

    assert storage.read_bytes(bucket + "/x") == CONTENT
    assert [seen.kind for seen in proxied.seen] == [kind, kind, ""]


@pytest.mark.parametrize("kind", ["slow_down", "truncate", "refuse"])
def test_a_fault_that_does_not_end_is_bounded_and_said(
    s3_server: Server, proxied: Proxy, bucket: str, kind: Kind
) -> None:
    """As many requests as attempts: no second layer multiplies them. Exit code 1, address, last error."""
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    storage.use(Options(attempts=4))
    proxied.fault("*", "", kind)

    with pytest.raises(StorageUnavailableError) as caught:
        storage.read_bytes(bucket + "/x")

    # aiohttp asks once more by itself where the connection ends before an answer begins.
    assert proxied.count("*", "") == (8 if kind == "refuse" else 4)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"Could not read s3://faults/x at {proxied.endpoint} in 4 attempts. Got: ")
    assert "\n" not in str(caught.value)
    if kind == "slow_down":
        assert "SlowDown (503): Please reduce your request rate" in str(caught.value)


@pytest.mark.parametrize(
    "action",
    [
        lambda path, folder: storage.info(path),
        lambda path, folder: storage.list_files(path),
        lambda path, folder: storage.glob(path + "*"),
        lambda path, folder: storage.read_bytes(path, 5, 9),
        lambda path, folder: storage.write_bytes(path + "2", b"x"),
        lambda path, folder: storage.delete([path]),
        lambda path, folder: storage.download(path, folder / "x"),
        lambda path, folder: storage.open_input(path).read(),
        lambda path, folder: storage.check_access(path, write=True),
    ],
    ids=["info", "list_files", "glob", "read_bytes", "write_bytes", "delete", "download", "open_input", "check_access"],
)
def test_every_function_survives_a_throttled_request(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path, action: Callable[[str, Path], Any]
) -> None:
    """The first answer of each is 503 SlowDown; the outcome is that of a quiet day."""
    s3_server.client().put_object(Bucket="faults", Key="x", Body=b"0123456789")
    quiet = action(bucket + "/x", tmp_path)
    s3_server.client().put_object(Bucket="faults", Key="x", Body=b"0123456789")
    proxied.fault("*", "", "slow_down", 1)

    assert action(bucket + "/x", tmp_path) == quiet
    assert proxied.count("*", "", "slow_down") == 1


@pytest.mark.parametrize("kind", ["denied", "expired"])
def test_what_would_repeat_itself_is_asked_once(s3_server: Server, proxied: Proxy, bucket: str, kind: Kind) -> None:
    """Also with credentials that expire in the middle of a run."""
    proxied.fault("*", "", kind)

    with pytest.raises(StoreError, match={"denied": "access is denied", "expired": "have expired"}[kind]) as caught:
        storage.read_bytes(bucket + "/x")

    assert caught.value.exit_code == 2
    assert proxied.count("*", "") == 1


def test_a_download_goes_on_from_where_it_was(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of 1 MB; the second is reset half-way: it alone is asked for again."""
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1_000_000)
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    proxied.fault("GET", "/faults/x", "reset", 1, skip=1)  # the first block says how large it is

    storage.download(bucket + "/x", tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == CONTENT
    ranges = [seen.headers["Range"].removeprefix("bytes=") for seen in proxied.seen]
    assert ranges == ["0-999999", "1000000-1999999", "1000000-1999999", "2000000-2999999"]


@pytest.mark.parametrize("kind", ["reset", "truncate", "slow_down"])
def test_a_download_that_fails_leaves_no_file(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Neither half of it nor a temporary one; an older copy stays as it was."""
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1_000_000)
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    storage.use(Options(attempts=2))
    proxied.fault("GET", "/faults/x", kind, skip=2)

    with pytest.raises(StorageUnavailableError):
        storage.download(bucket + "/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "x").write_text("older")
    with pytest.raises(StorageUnavailableError):
        storage.download(bucket + "/x", tmp_path / "x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "older")]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["stall", "drip"])
def test_a_slow_body_is_given_up_and_asked_for_again(
    s3_server: Server, proxied: Proxy, bucket: str, kind: Kind
) -> None:
    """Half of it and then silence; or ten bytes a second, no time-out of a socket and yet no way to read 3 MB: it
    would take 83 hours."""
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    proxied.fault("GET", "/faults/x", kind, 2)

    assert storage.read_bytes(bucket + "/x") == CONTENT
    assert proxied.count("GET", "/faults/x", kind) == 2


def test_a_stream_survives_a_reset_in_each_of_its_ranges(s3_server: Server, proxied: Proxy, bucket: str) -> None:
    """Three ranges, three resets, six requests; with one attempt for all of them it could not end."""
    s3_server.client().put_object(Bucket="faults", Key="x", Body=CONTENT)
    storage.use(Options(attempts=2))
    with storage.open_input(bucket + "/x", block=1_000_000) as stream:
        for start in (0, 1_000_000, 2_000_000):
            proxied.clear()
            proxied.fault("GET", "/faults/x", "reset", 1)
            assert stream.read(1_000_000) == CONTENT[start : start + 1_000_000]
            assert [seen.kind for seen in proxied.seen] == ["reset", ""]


@pytest.mark.parametrize("kind", ["slow_down", "refuse", "cut_upload", "damage_upload", "lost_answer"])
def test_a_write_that_fails_twice_is_whole_the_third_time(
    s3_server: Server, proxied: Proxy, bucket: str, kind: Kind
) -> None:
    """Also when a bit changes on the way: the server compares a checksum that was sent along."""
    proxied.fault("PUT", "/faults/x", kind, 2)

    storage.write_bytes(bucket + "/x", CONTENT)

    assert [seen.kind for seen in proxied.seen] == [kind, kind, ""]
    assert s3_server.objects("faults") == {"x": CONTENT}


@pytest.mark.parametrize("kind", ["cut_upload", "slow_down"])
def test_an_upload_that_dies_half_way_is_absent(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path, kind: Kind
) -> None:
    """Its second of three parts never arrives: no object, no parts left, and an older object as it was."""
    (tmp_path / "large").write_bytes(LARGE)
    s3_server.client().put_object(Bucket="faults", Key="x", Body=b"older")
    storage.use(Options(attempts=2))
    proxied.fault("PUT", r"/faults/x\?.*partNumber=2", kind)

    with pytest.raises(StorageUnavailableError, match=r"Could not write s3://faults/x at .* in 2 attempts"):
        storage.upload(tmp_path / "large", bucket + "/x")

    assert proxied.count("PUT", "partNumber=2") == (4 if kind == "cut_upload" else 2)  # aiohttp's once more, as above
    assert s3_server.objects("faults") == {"x": b"older"}
    assert s3_server.unfinished("faults") == []


def test_an_upload_whose_every_step_fails_once_is_whole(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path
) -> None:
    """Beginning, each part and the end."""
    (tmp_path / "large").write_bytes(LARGE)
    proxied.fault("POST", r"/faults/x\?uploads", "slow_down", 1)
    for part, kind in ((1, "cut_upload"), (2, "lost_answer"), (3, "slow_down")):
        proxied.fault("PUT", f"partNumber={part}", kind, 1)  # type: ignore[arg-type]
    proxied.fault("POST", r"/faults/x\?uploadId=", "lost_answer", 1)

    storage.upload(tmp_path / "large", bucket + "/x")

    assert proxied.count("PUT", "partNumber=") == 6
    assert proxied.count("POST", "uploadId=") == 2
    assert s3_server.objects("faults") == {"x": LARGE}
    assert s3_server.unfinished("faults") == []


def test_an_end_whose_answer_was_lost_is_told_from_an_upload_that_someone_else_ended(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path
) -> None:
    """A server that forgets finished uploads says NoSuchUpload both times: the object itself tells."""
    (tmp_path / "large").write_bytes(LARGE)
    proxied.fault("POST", r"uploadId=", "lost_answer", 1)
    proxied.fault("POST", r"uploadId=", "no_such_upload", 1)
    storage.upload(tmp_path / "large", bucket + "/x")
    assert s3_server.objects("faults") == {"x": LARGE}

    proxied.fault("POST", r"/faults/y\?uploadId=", "no_such_upload", 1)
    with pytest.raises(StoreError, match="The upload to s3://faults/y was ended by someone else"):
        storage.upload(tmp_path / "large", bucket + "/y")


def test_an_upload_that_cannot_even_be_aborted_says_what_may_remain(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path
) -> None:
    """The first error stays the one that is raised."""
    (tmp_path / "large").write_bytes(LARGE)
    storage.use(Options(attempts=2))
    proxied.fault("PUT", "partNumber=3", "slow_down")
    proxied.fault("DELETE", "uploadId=", "internal_error")

    with pytest.raises(StorageUnavailableError, match="SlowDown") as caught:
        storage.upload(tmp_path / "large", bucket + "/x")

    assert "may remain" in caught.value.__notes__[0]
    assert s3_server.objects("faults") == {}


def test_a_file_that_shrinks_while_it_is_sent_is_noticed(s3_server: Server, bucket: str, tmp_path: Path) -> None:
    """A part that is not there any more: no object."""
    source = tmp_path / "large"
    source.write_bytes(LARGE)

    class Shrinking(type(source)):  # type: ignore[misc]
        def stat(self, **arguments: Any) -> Any:
            found = super().stat(**arguments)
            source.write_bytes(LARGE[:-1])
            return found

    with pytest.raises(StoreError, match="got shorter while it was being uploaded"):
        storage.upload(Shrinking(source), bucket + "/x")
    assert s3_server.objects("faults") == {}
    assert s3_server.unfinished("faults") == []


def test_a_mirror_does_not_trust_listings(s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path) -> None:
    """A listing that lags shows nothing of what was published; it is fetched all the same."""
    here, there = Mirror(bucket + "/out", tmp_path / "here"), Mirror(bucket + "/out", tmp_path / "there")
    here.path.mkdir()
    (here.path / "part").write_bytes(CONTENT)
    proxied.fault("GET", "list-type=2", "empty_listing")

    here.publish("part")

    assert storage.list_files(bucket + "/out") == []
    assert there.fetch("part", size=len(CONTENT)).read_bytes() == CONTENT
    assert proxied.count("GET", "list-type=2") == 1  # the one above


def test_of_many_files_one_failure_is_the_whole_call_s(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path
) -> None:
    """The others may have arrived, but the caller learns that not all did, and so never writes its record."""
    mirror = Mirror(bucket + "/out", tmp_path)
    names = [f"part-{number:02}" for number in range(12)]
    for name in names:
        (tmp_path / name).write_text(name)
    storage.use(Options(attempts=2))
    proxied.fault("PUT", "part-05", "slow_down")

    with pytest.raises(StorageUnavailableError, match="part-05"):
        mirror.publish(*names)

    proxied.clear()
    mirror.publish(*names)
    assert {key.removeprefix("out/"): text.decode() for key, text in s3_server.objects("faults").items()} == {
        name: name for name in names
    }


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_many_files_survive_faults_of_every_kind_by_lot(
    s3_server: Server, proxied: Proxy, bucket: str, tmp_path: Path
) -> None:
    """120 files up and down while one request in four goes wrong in a way drawn by lot: every byte is right."""
    lot = random.Random(3)
    storage.use(Options(attempts=12))
    here, there = Mirror(bucket + "/out", tmp_path / "here"), Mirror(bucket + "/out", tmp_path / "there")
    here.path.mkdir()
    names = [f"part-{number:03}" for number in range(120)]
    for name in names:
        (here.path / name).write_bytes(lot.randbytes(lot.randrange(200_000)))
    kinds: tuple[Kind, ...] = ("slow_down", "internal_error", "refuse", "lost_answer")
    for _ in range(60):
        proxied.fault("PUT", "", lot.choice((*kinds, "cut_upload")), 1, skip=lot.randrange(100))
        proxied.fault("GET", "", lot.choice((*kinds, "reset", "truncate", "stall")), 1, skip=lot.randrange(100))

    here.publish(*names)
    for name in names:
        there.fetch(name)

    assert proxied.count("*", "") - proxied.count("*", "", "") >= 100
    for name in names:
        assert (there.path / name).read_bytes() == (here.path / name).read_bytes()
    assert sorted(path.name for path in there.path.iterdir()) == names
