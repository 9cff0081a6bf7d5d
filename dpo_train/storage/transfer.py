"""Whole files, down and up. A file or an object is whole or absent, whatever happens on the way."""

from __future__ import annotations

import base64
import errno
import hashlib
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpo_train.errors import DiskFullError, DpoError, StoreError
from dpo_train.storage import client, failures, objects
from dpo_train.storage.client import ask
from dpo_train.storage.objects import read_bytes
from dpo_train.storage.paths import split

PART_BYTES = 8 * 1024 * 1024  # S3 takes parts from 5 MB on; what a failure in the middle costs at most
SINGLE_BYTES = 16 * 1024 * 1024  # up to this size in one request
_MOST_PARTS = 10_000  # S3's limit
_THREADS = 4

Reader = Callable[[int, int], bytes]


def download(path: str, target: Path) -> None:
    """An object to a local file, block by block; a block that fails is asked for again, the ones before it are kept.

    Raises:
        StoreError: there is no such object, it was replaced meanwhile, or the folder cannot be written.
        DiskFullError: the local disk is full.
    """
    content, entry = objects.first_block(path, objects.BLOCK_BYTES)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            for start in range(len(content), entry.size, objects.BLOCK_BYTES):
                file.write(read_bytes(path, start, min(start + objects.BLOCK_BYTES, entry.size), etag=entry.etag))
        temporary.replace(target)
    except DpoError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(
                f"The disk is full: {path} ({entry.size} bytes) does not fit into {target.parent}",
                fix="free some space, or set storage.cache or DPO_CACHE to a folder on another disk",
            ) from error
        raise StoreError(
            f"Cannot write {target}: {error.strerror}", fix="set storage.cache or DPO_CACHE to a folder of yours"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def upload(source: Path, path: str) -> None:
    """A local file to an object; large ones in parts, a few at a time.

    Raises:
        StoreError: the file cannot be read, or got shorter meanwhile.
    """

    def reader(start: int, stop: int) -> bytes:
        with source.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if len(content) != stop - start:
            raise StoreError(
                f"{source} got shorter while it was being uploaded", fix="run again when its writer is done"
            )
        return content

    try:
        size = source.stat().st_size
        _send(path, size, reader)
    except DpoError:
        raise
    except OSError as error:
        raise StoreError(f"Cannot read {source}: {error.strerror}") from error


def write_bytes(path: str, content: bytes) -> None:
    """An object with this content, whole or absent."""
    _send(path, len(content), lambda start, stop: content[start:stop])


def _send(path: str, size: int, reader: Reader) -> None:
    if size > SINGLE_BYTES:
        _send_parts(path, size, reader)
        return
    bucket, key = split(path)
    content = reader(0, size)
    request = {"Bucket": bucket, "Key": key, "Body": content, "ContentMD5": _md5(content)}

    async def question(s3: Any) -> None:
        await s3.put_object(**request)

    ask("write", path, question, limit_s=_limit_s(size))


def _send_parts(path: str, size: int, reader: Reader) -> None:
    bucket, key = split(path)
    target = {"Bucket": bucket, "Key": key}
    part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
    starts = range(0, size, part_bytes)

    async def begin(s3: Any) -> str:
        return str((await s3.create_multipart_upload(**target))["UploadId"])

    target["UploadId"] = ask("write", path, begin)

    def send(number: int, start: int) -> dict[str, object]:
        content = reader(start, min(start + part_bytes, size))
        request = {**target, "PartNumber": number, "Body": content, "ContentMD5": _md5(content)}

        async def part(s3: Any) -> str:
            return str((await s3.upload_part(**request))["ETag"])

        return {"PartNumber": number, "ETag": ask("write", path, part, limit_s=_limit_s(len(content)))}

    try:
        parts = client.in_threads([partial(send, number, start) for number, start in enumerate(starts, 1)], _THREADS)
        _complete(path, size, target, parts)
    except BaseException as error:
        _abort(path, target, error)
        raise


def _complete(path: str, size: int, target: dict[str, str], parts: list[dict[str, object]]) -> None:
    async def complete(s3: Any) -> bool:
        try:
            await s3.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except s3.exceptions.ClientError as error:
            if failures.code_of(error) != "NoSuchUpload":
                raise
            return False
        return True

    if not ask("write", path, complete):
        # The answer to an earlier attempt got lost: then the object is there.
        entry = objects.info(path)
        if entry is None or entry.size != size or not entry.etag.endswith(f"-{len(parts)}"):
            raise StoreError(f"The upload to {path} was ended by someone else", fix="run the same command again")


def _abort(path: str, target: dict[str, str], error: BaseException) -> None:
    """Frees the parts on the server; if even that fails, the first error stays the one that is raised."""

    async def abort(s3: Any) -> None:
        try:
            await s3.abort_multipart_upload(**target)
        except s3.exceptions.ClientError as answer:
            if failures.code_of(answer) != "NoSuchUpload":
                raise

    try:
        ask("write", path, abort, attempts=min(2, client.options().attempts))
    except DpoError as second:
        error.add_note(f"Parts of the unfinished upload may remain on the server: {second}")


def _md5(content: bytes) -> str:
    """What the server compares the received bytes with."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _limit_s(size: int) -> float:
    """Seconds for one attempt to send so many bytes: a server that stops reading has no time-out of its own."""
    return client.CONNECT_TIMEOUT_S + 2 * client.READ_TIMEOUT_S + size / client.SLOWEST_BYTES_PER_S
