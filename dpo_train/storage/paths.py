"""Addresses as text. A key is taken literally: "?", "#", "%" and doubled slashes mean nothing special."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_train.errors import StoreError

SCHEME = "s3://"
_WILDCARD = re.compile(r"[*?\[]")


def is_remote(path: str) -> bool:
    """Whether this address lies in object storage."""
    return path.startswith(SCHEME)


def join(base: str, *parts: str) -> str:
    """An address below another one, local or at s3://."""
    if not is_remote(base):
        return str(Path(base, *parts))
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def name_of(path: str) -> str:
    """The last part of an address, local or at s3://."""
    return path.rstrip("/").rpartition("/")[2]


def split(path: str) -> tuple[str, str]:
    """Bucket and key; the key is empty for the bucket itself.

    Raises:
        StoreError: this is no s3:// address with a bucket.
    """
    bucket, _, key = path.removeprefix(SCHEME).partition("/")
    if not is_remote(path) or not bucket:
        raise StoreError("This is not an address in object storage", got=repr(path), expected="s3://BUCKET/KEY")
    return bucket, key


def literal_prefix(key: str) -> str:
    """What every key that matches this pattern starts with; the key itself where it holds no wildcard."""
    found = _WILDCARD.search(key)
    return key[: found.start()] if found else key
