"""Look at, read and delete objects; and the quick question whether one may."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

from dpo_train.errors import StoreError
from dpo_train.storage import client, failures
from dpo_train.storage.client import ask
from dpo_train.storage.paths import SCHEME, literal_prefix, split

T = TypeVar("T")

BLOCK_BYTES = 8 * 1024 * 1024  # one request of a streaming read; what a failure in the middle costs at most
_CHUNK_BYTES = 1024 * 1024
_THREADS = 8
_MISSING = {"NoSuchKey", "NoSuchVersion"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One object."""

    path: str
    size: int
    """In bytes."""
    etag: str
    """Changes with the content."""


def info(path: str) -> Entry | None:
    """Size and etag of an object, or None if there is none. A missing bucket is an error, not None.

    Asks for the first byte rather than with HEAD, whose answer has no body and so never says what is wrong.
    """
    bucket, key = split(path)

    async def question(s3: Any) -> Entry | None:
        try:
            answer = await s3.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
        except s3.exceptions.ClientError as error:
            if failures.code_of(error) in _MISSING:
                return None
            if failures.code_of(error) != "InvalidRange":
                raise
            return await _empty_object(s3, path)
        await _body(answer["Body"])
        total = answer["ContentRange"].rpartition("/")[2] if "ContentRange" in answer else answer["ContentLength"]
        return Entry(path, int(total), str(answer["ETag"]).strip('"'))

    return ask("read", path, question) if key else None


def present(path: str) -> Entry:
    """The same, where a missing object is a StoreError."""
    return _or_error(info(path), path)


def _or_error(found: T | None, path: str) -> T:
    if found is None:
        raise StoreError(f"There is no object {path}", fix="check the address")
    return found


def first_block(path: str, size: int) -> tuple[bytes, Entry]:
    """The object's first bytes, at most so many, and what it is. A missing object is a StoreError."""
    return _or_error(find_bytes(path, size), path)


def list_files(path: str) -> list[Entry]:
    """All objects below a folder, sorted by path; empty if there are none. A listing may lag behind writes."""
    bucket, key = split(path)
    return _listed(bucket, f"{key.rstrip('/')}/" if key.rstrip("/") else "")


def glob(pattern: str) -> list[Entry]:
    """All objects that match, sorted by path: ``*`` and ``?`` within a folder, ``**`` across, ``[ab]`` one of these."""
    client.package()
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    bucket, key = split(pattern)
    try:
        matches = re.compile(glob_translate(key)).match
    except (ValueError, re.error) as error:
        raise StoreError(f"The pattern {pattern} is not valid", got=str(error)) from error
    start = len(f"{SCHEME}{bucket}/")
    return [entry for entry in _listed(bucket, literal_prefix(key)) if matches(entry.path[start:])]


def _listed(bucket: str, prefix: str) -> list[Entry]:
    found: list[Entry] = []
    page: dict[str, str] = {}
    while True:

        async def question(s3: Any, page: dict[str, str] = page) -> Any:
            return await s3.list_objects_v2(Bucket=bucket, Prefix=prefix, **page)

        answer = ask("list", f"{SCHEME}{bucket}/{prefix}", question)
        for item in answer.get("Contents", ()):
            if not item["Key"].endswith("/"):  # the mark that some tools leave for a folder
                found.append(Entry(f"{SCHEME}{bucket}/{item['Key']}", int(item["Size"]), item["ETag"].strip('"')))
        if not answer.get("IsTruncated"):
            return sorted(found, key=lambda entry: entry.path)
        page = {"ContinuationToken": answer["NextContinuationToken"]}


def read_bytes(path: str, start: int = 0, stop: int | None = None, *, etag: str | None = None) -> bytes:
    """The object's bytes from ``start`` to before ``stop``, as a slice would give them; verified to be all of them.

    Args:
        etag: only of this version; another one is an error.
    """
    split(path)
    if stop is not None and stop <= start:
        return b""

    async def question(s3: Any) -> bytes:
        try:
            return (await _slice(s3, path, start, stop, etag))[0]
        except s3.exceptions.ClientError as error:
            if failures.code_of(error) == "InvalidRange":  # it starts behind the end
                return b""
            raise

    return ask("read", path, question)


def find_bytes(path: str, stop: int | None = None) -> tuple[bytes, Entry] | None:
    """The object's bytes, all or those before ``stop``, and what it is; None if there is none. One request."""

    async def question(s3: Any) -> tuple[bytes, Entry] | None:
        try:
            return await _slice(s3, path, 0, stop)
        except s3.exceptions.ClientError as error:
            if failures.code_of(error) in _MISSING:
                return None
            if failures.code_of(error) != "InvalidRange":
                raise
            return b"", await _empty_object(s3, path)

    return ask("read", path, question)


async def _slice(s3: Any, path: str, start: int, stop: int | None, etag: str | None = None) -> tuple[bytes, Entry]:
    """Some of an object's bytes, verified to be all that were asked for."""
    bucket, key = split(path)
    request = {"Bucket": bucket, "Key": key, **({"IfMatch": f'"{etag}"'} if etag else {})}
    if start or stop is not None:
        request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    answer = await s3.get_object(**request)
    content = await _body(answer["Body"])
    first, size = _range_of(answer) if "Range" in request else (0, int(answer["ContentLength"]))
    if first != start or len(content) != (size if stop is None else min(stop, size)) - start:
        raise ConnectionError(f"asked for {request.get('Range', 'all')}, got {len(content)} bytes from {first}")
    return content, Entry(path, size, str(answer["ETag"]).strip('"'))


async def _empty_object(s3: Any, path: str) -> Entry:
    """An object that has no first byte to ask for."""
    bucket, key = split(path)
    answer = await s3.head_object(Bucket=bucket, Key=key)
    return Entry(path, int(answer["ContentLength"]), str(answer["ETag"]).strip('"'))


def _range_of(answer: dict[str, Any]) -> tuple[int, int]:
    """Where the sent bytes start, and where the object ends. A server that ignores ranges sends all from 0."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange") or "")
    return (int(found[1]), int(found[2])) if found else (0, int(answer["ContentLength"]))


async def _body(stream: Any) -> bytes:
    """All of a body; the stream itself checks it against Content-Length."""
    start = time.monotonic()
    content = bytearray()
    try:
        while chunk := await stream.read(_CHUNK_BYTES):
            content += chunk
            seconds = time.monotonic() - start
            if seconds > client.READ_TIMEOUT_S and len(content) < seconds * client.SLOWEST_BYTES_PER_S:
                raise TimeoutError(f"only {len(content)} bytes in {seconds:.0f} s")
    finally:
        stream.close()
    return bytes(content)


class _Input(io.RawIOBase):
    """An object as a raw file. Each range is a request of its own and retried by itself."""

    def __init__(self, entry: Entry, block: int) -> None:
        super().__init__()
        self._entry = entry
        self._block = block
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        stop = min(self._position + min(len(target), self._block), self._entry.size)
        content = read_bytes(self._entry.path, self._position, stop, etag=self._entry.etag)
        target[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_input(path: str, *, block: int = BLOCK_BYTES) -> BinaryIO:
    """An object of any size for reading, seekable, in memory only a few blocks. Replaced meanwhile: a StoreError.

    Args:
        block: bytes of one request; smaller ones suit readers that jump about, such as Parquet's.
    """
    return cast(BinaryIO, io.BufferedReader(_Input(present(path), block), buffer_size=block))


def delete(paths: Iterable[str]) -> None:
    """Deletes these objects; one that does not exist is no error."""

    def one(path: str) -> None:
        bucket, key = split(path)

        async def question(s3: Any) -> None:
            await s3.delete_object(Bucket=bucket, Key=key)

        ask("delete", path, question)

    client.in_threads([partial(one, path) for path in paths], _THREADS)


def check_access(path: str, *, write: bool) -> None:
    """One quick question, so that what is wrong is said before anything slow starts.

    Args:
        path: an object, a folder or a glob; it need not exist, its bucket must.
        write: whether objects may be written there too; leaves nothing behind.

    Raises:
        StoreError, StorageUnavailableError: as everywhere, after two attempts at most.
    """
    bucket, key = split(path)
    prefix = literal_prefix(key)
    attempts = min(2, client.options().attempts)

    async def readable(s3: Any) -> None:
        try:
            await s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except s3.exceptions.ClientError as error:
            if failures.code_of(error) != "AccessDenied" or not prefix:
                raise
            await _body((await s3.get_object(Bucket=bucket, Key=key, Range="bytes=0-0"))["Body"])  # may read, not list

    async def writable(s3: Any) -> None:
        # An upload that is begun and dropped asks for the same permission as an object, and is never seen as one.
        target = {"Bucket": bucket, "Key": f"{key.rstrip('/')}/access-check".lstrip("/")}
        begun = await s3.create_multipart_upload(**target)
        await s3.abort_multipart_upload(**target, UploadId=begun["UploadId"])

    ask("read", path, readable, attempts=attempts)
    if write:
        ask("write", path, writable, attempts=attempts)
