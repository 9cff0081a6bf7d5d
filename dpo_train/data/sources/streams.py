"""Files and objects as streams of bytes, decompressed; what is wrong with them becomes a DataError."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

from dpo_train import storage
from dpo_train.data.sources.base import Block
from dpo_train.errors import DataError, DpoError, first_line

BUFFER_BYTES = 2**18
REQUEST_BYTES = 8 * 2**20

# What the readers of damaged or vanished files raise; our own errors pass.
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException)


def open_raw(path: str, request_bytes: int = REQUEST_BYTES) -> BinaryIO:
    """A seekable stream of a file's bytes, or of an object's, which comes in requests of this size."""
    if storage.is_remote(path):
        return storage.open_input(path, block=request_bytes)
    return open(path, "rb", buffering=BUFFER_BYTES)  # noqa: PTH123 # a Path would only be made to be unmade


def request_bytes(block: Block) -> int:
    """One request for a small block and what its last record needs behind it, several for a large one."""
    return min(REQUEST_BYTES, block.size_bytes + BUFFER_BYTES)


@contextlib.contextmanager
def open_block(block: Block) -> Iterator[BinaryIO]:
    """The block's file, decompressed, from its first byte.

    Raises:
        DataError: it cannot be opened or read, or its compressed data is damaged; how much is lost cannot be told, so
            none of it is used.
    """
    with reading(block.name), open_raw(block.path, request_bytes(block)) as raw:
        if not block.compression:
            yield raw
            return
        try:
            yield _decompressed(raw, block.compression)
        except DpoError:
            raise
        except READ_ERRORS as error:
            raise DataError(
                f"{block.name} is damaged: {_words(error)}",
                got=f"a break in its compressed data near byte {raw.tell()} of {block.stop}",
                expected=f"a whole .{block.compression} file",
                fix="copy or compress it again",
            ) from None


def _words(error: Exception) -> str:
    # Python's words for it show the first bytes as Python writes them.
    is_none = isinstance(error, gzip.BadGzipFile) and str(error).startswith("Not a gzipped file")
    return "it is no gzip file" if is_none else first_line(error)


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    stream = gzip.GzipFile(fileobj=raw) if compression == "gz" else pa.CompressedInputStream(_native(raw), "zstd")
    return io.BufferedReader(cast(io.RawIOBase, stream), BUFFER_BYTES)


def _native(raw: BinaryIO) -> pa.NativeFile:
    return pa.PythonFile(raw, mode="r")


@contextlib.contextmanager
def reading(name: str, where: str = "") -> Iterator[None]:
    """Turns what a damaged, vanished or forbidden file raises into a DataError that names it."""
    try:
        yield
    except DpoError:
        raise
    except READ_ERRORS as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(
            f"{name}{where} cannot be read: {words}", fix="check that the file is whole and that you may read it"
        ) from None
