"""Object storage without a server: addresses, what an error means, pauses, and folders that are local anyway."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)

from dpo_train import storage
from dpo_train.errors import MissingPackageError, StorageUnavailableError, StoreError, decode, encode
from dpo_train.storage import Mirror, failures
from dpo_train.storage.client import in_threads
from dpo_train.storage.failures import described, is_foreign, may_pass, pause_s, refusal
from dpo_train.storage.paths import literal_prefix, split


def _answer(code: str, status: int, message: str = "said the server") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[arg-type]
        "GetObject",
    )


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket", ("a", "b.txt"), "s3://bucket/a/b.txt"),
        ("s3://bucket/", ("a/",), "s3://bucket/a"),
        ("s3://bucket/a b/c?d", ("x#y",), "s3://bucket/a b/c?d/x#y"),
        ("folder", ("a", "b.txt"), "folder/a/b.txt"),
        ("/folder/", ("a",), "/folder/a"),
    ],
)
def test_addresses_are_joined_as_paths_are(base: str, parts: tuple[str, ...], joined: str) -> None:
    """One slash between parts; a key's own characters stay."""
    assert storage.join(base, *parts) == joined
    assert storage.name_of(joined) == parts[-1].strip("/")


def test_an_address_splits_into_bucket_and_literal_key() -> None:
    """Nothing in a key is a query or an escape."""
    assert split("s3://bucket/a//b?c#d%20e") == ("bucket", "a//b?c#d%20e")
    assert split("s3://bucket") == ("bucket", "")


@pytest.mark.parametrize("path", ["/tmp/x", "s3:/bucket/x", "s3://", "s3:///key", "https://host/x", ""])
def test_what_is_no_address_is_said_to_be_none(path: str) -> None:
    """A local path that got here by mistake is not taken for a bucket."""
    with pytest.raises(StoreError, match="not an address in object storage"):
        split(path)


@pytest.mark.parametrize(
    ("key", "prefix"), [("a/b/*.json", "a/b/"), ("a/b?", "a/b"), ("**/x", ""), ("a[12]/b", "a"), ("a/b", "a/b")]
)
def test_a_pattern_is_listed_from_its_literal_start(key: str, prefix: str) -> None:
    """A glob does not list the whole bucket."""
    assert literal_prefix(key) == prefix


@pytest.mark.parametrize(
    "error",
    [
        _answer("SlowDown", 503),
        _answer("503", 503),
        _answer("InternalError", 500),
        _answer("502", 502),
        _answer("WhatIsThis", 504),
        _answer("TooManyRequests", 429),
        _answer("RequestTimeout", 400),
        _answer("BadDigest", 400),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        ConnectTimeoutError(endpoint_url="http://127.0.0.1:1"),
        ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        SSLError(endpoint_url="https://127.0.0.1:1", error="EOF occurred in violation of protocol"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
    ],
    ids=lambda error: described(error)[:40],
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    """Throttling, a server's own trouble, and everything between it and us."""
    assert may_pass(error)
    assert is_foreign(error)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NoCredentialsError(), "there are no credentials.*AWS_ACCESS_KEY_ID"),
        (ProfileNotFound(profile="nobody"), "profile does not exist.*nobody"),
        (_answer("InvalidAccessKeyId", 403), "does not know this access key.*check AWS_ACCESS_KEY_ID"),
        (_answer("SignatureDoesNotMatch", 403), "secret key does not belong.*check AWS_SECRET_ACCESS_KEY"),
        (_answer("ExpiredToken", 400), "credentials have expired.*renew them"),
        (_answer("AccessDenied", 403), "access is denied.*ask for s3:GetObject"),
        (_answer("403", 403), "access is denied.*ask for s3:GetObject"),
        (_answer("NoSuchBucket", 404), "bucket does not exist.*or create it"),
        (_answer("NoSuchKey", 404), "object does not exist"),
        (_answer("PermanentRedirect", 301), "another region.*AWS_REGION"),
        (_answer("RequestTimeTooSkewed", 403), "clock differs"),
        (_answer("NotImplemented", 501), "request was refused.*NotImplemented \\(501\\): said the server"),
        (_answer("SomethingNew", 418), "request was refused.*SomethingNew \\(418\\)"),
        (ParamValidationError(report="Invalid bucket name"), "not valid.*Invalid bucket name"),
        (ValueError("Invalid endpoint: localhost"), "address is not valid.*AWS_ENDPOINT_URL"),
        (SSLError(endpoint_url="https://h", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "not trusted"),
    ],
    ids=lambda value: value if isinstance(value, str) else described(value)[:40],
)
def test_what_would_repeat_itself_is_one_line_with_a_remedy(error: Exception, says: str) -> None:
    """The user's mistakes: exit code 2, one line, what to do."""
    assert not may_pass(error)
    assert is_foreign(error)
    refused = refusal(error, "read", "s3://bucket/key", anonymous=False)

    assert refused.exit_code == 2
    assert "\n" not in str(refused)
    assert str(refused).startswith("Cannot read s3://bucket/key: ")
    assert "What to do: " in str(refused)
    with pytest.raises(StoreError, match=says):
        raise refused


def test_a_mistake_of_our_own_is_neither_retried_nor_disguised() -> None:
    """A TypeError in this program is no trouble of the server."""
    assert not is_foreign(TypeError("unexpected keyword"))
    assert not is_foreign(ValueError("bad value"))


def test_without_credentials_the_remedy_is_credentials() -> None:
    """Who asked anonymously is not told to ask for permissions."""
    refused = refusal(_answer("AccessDenied", 403), "list", "s3://b/", anonymous=True)

    assert "storage.anonymous: false" in str(refused)


def test_permissions_are_named_after_what_was_tried() -> None:
    """The remedy of a refused write is not the permission to read."""
    assert "s3:PutObject" in str(refusal(_answer("AccessDenied", 403), "write", "s3://b/k", anonymous=False))
    assert "s3:ListBucket" in str(refusal(_answer("AccessDenied", 403), "list", "s3://b/", anonymous=False))


def test_messages_hold_no_keys() -> None:
    """Neither an access key that the server repeats nor a password in an address."""
    told = described(_answer("Odd", 400, "key AKIAABCDEFGHIJKLMNOP at http://user:secret@host/x\nsecond line"))

    assert told == "Odd (400): key AKIA*** at http://***@host/x second line"


def test_pauses_double_up_to_a_bound_and_are_spread_by_luck() -> None:
    """0.2 s doubling, at most 10 s; half of that with the worst luck for the server."""
    assert [pause_s(failures, 1.0) for failures in (1, 2, 3, 4, 5, 6, 7, 50)] == pytest.approx(
        [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    )
    assert pause_s(1, 0.0) == pytest.approx(0.1)
    assert pause_s(7, 0.5) == pytest.approx(7.5)


def test_an_unavailable_storage_keeps_its_kind_between_processes() -> None:
    """Ranks hand their errors on as text, workers by pickle."""
    error = StorageUnavailableError("Could not read s3://b/k at http://h in 6 attempts", got="SlowDown (503): no")

    assert error.exit_code == 1
    assert type(decode(encode(error))) is StorageUnavailableError
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_without_s3fs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ImportError from deep inside."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    storage.use(storage.Options(region="nowhere-yet"))
    try:
        for question in (storage.info, storage.glob, storage.list_files):
            with pytest.raises(MissingPackageError, match=r"pip install 'dpo-train\[s3\]'"):
                question("s3://bucket/key")  # type: ignore[operator]
    finally:
        storage.use(storage.Options())


@pytest.mark.parametrize("option", ["127.0.0.1:9000", "localhost", "s3://bucket"])
def test_an_endpoint_without_http_is_named(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """In the options as in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", option)

    with pytest.raises(StoreError, match=f"not the address of a server. Got: {option}. Expected: https://HOST"):
        storage.info("s3://bucket/key")


def test_the_cache_is_where_options_environment_and_home_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order."""
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.delenv("DPO_CACHE", raising=False)
    assert storage.cache_folder() == Path("/somebody/.cache/dpo")
    monkeypatch.setenv("DPO_CACHE", "~/big")
    assert storage.cache_folder() == Path("/somebody/big")
    storage.use(storage.Options(cache="/disk"))
    try:
        assert storage.cache_folder() == Path("/disk")
        assert pickle.loads(pickle.dumps(storage.options())) == storage.options()
    finally:
        storage.use(storage.Options())


def test_a_mirror_of_a_local_folder_is_the_folder(tmp_path: Path) -> None:
    """Nothing is copied; what is missing or has another size is said."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0").write_bytes(b"abc")
    mirror = pickle.loads(pickle.dumps(Mirror(str(tmp_path), tmp_path)))

    mirror.publish("shards/0")
    assert mirror.fetch("shards/0", size=3) == tmp_path / "shards" / "0"
    with pytest.raises(StoreError, match=r"has another size than when it was made. Got: 3 bytes. Expected: 4"):
        mirror.fetch("shards/0", size=4)
    with pytest.raises(StoreError, match=r"There is no file .*shards/1"):
        mirror.fetch("shards/1")
    with pytest.raises(StoreError, match="to publish"):
        mirror.publish("shards/1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "shards"]


def test_after_a_failure_the_rest_does_not_start() -> None:
    """One thread: the third of four pieces of work fails, and the fourth is never done."""
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        if number == 3:
            raise StoreError("three")
        return number

    assert in_threads([lambda: work(1), lambda: work(2)], 4) == [1, 2]
    done.clear()
    with pytest.raises(StoreError, match="three"):
        in_threads([(lambda number=number: work(number)) for number in (1, 2, 3, 4)], 1)
    assert done[:3] == [1, 2, 3]


def test_every_code_that_is_refused_has_a_remedy() -> None:
    """The table itself: no two outcomes for one code, and no empty advice."""
    both = set(failures._REFUSALS) & failures._PASSING_CODES

    assert both == set()
    assert all(what and fix for what, fix in failures._REFUSALS.values())
