"""A source to blocks, and to a digest of its content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_train import storage
from dpo_train.config import SourceConfig
from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block
from dpo_train.data.sources.finding import DataFile, find_files
from dpo_train.data.sources.hub import digest_hub, is_hub, plan_hub
from dpo_train.data.sources.streams import reading
from dpo_train.data.sources.tables import arrow_batches, parquet_groups
from dpo_train.errors import DataError

# Footers in a bucket are waited for, not worked on.
_REQUESTS_AT_ONCE = 16


def plan(source: SourceConfig, index: int) -> list[Block]:
    """The blocks of a source, file by file; ``index`` is its place in the config.

    Raises:
        DataError: the source cannot be found or opened, or is empty.
        MissingPackageError: a package for this kind of source is not installed.
    """
    if is_hub(source.path):
        blocks = plan_hub(source, index)
    else:
        files = find_files(source)
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE if storage.is_remote(source.path) else 1) as pool:
            planned = pool.map(lambda file: list(_blocks_of(file, index)), files)
            blocks = list(itertools.chain.from_iterable(planned))
    if not blocks:
        raise DataError(
            f"The data at {source.path} is empty",
            expected="at least one record",
            fix="check the path, and that the data was written",
        )
    return blocks


def _blocks_of(file: DataFile, index: int) -> Iterator[Block]:
    kind, compression = file.kind

    def block(kind: str, start: int, stop: int, size_bytes: int, first_line: int) -> Block:
        return Block(index, file.name, file.path, kind, compression, start, stop, size_bytes, first_line)

    if kind == "parquet":
        yield from _parquet_blocks(file, block)
    elif kind == "arrow":
        yield from _arrow_blocks(file, block)
    elif kind == "jsonl" and not compression:
        for start in range(0, file.size_bytes, base.BLOCK_BYTES):
            stop = min(start + base.BLOCK_BYTES, file.size_bytes)
            yield block(kind, start, stop, stop - start, int(start == 0))
    elif file.size_bytes:
        yield block(kind, 0, file.size_bytes, file.size_bytes, 1)


MakeBlock = Callable[[str, int, int, int, int], Block]


def _parquet_blocks(file: DataFile, block: MakeBlock) -> Iterator[Block]:
    first_line = 1
    for group, (rows, size_bytes) in enumerate(parquet_groups(file.name, file.path)):
        if rows:
            yield block("parquet", group, group + 1, size_bytes, first_line)
        first_line += rows


def _arrow_blocks(file: DataFile, block: MakeBlock) -> Iterator[Block]:
    kind, batches = arrow_batches(file.name, file.path, file.size_bytes)
    if kind == "arrow_stream" and storage.is_remote(file.path):
        yield block(kind, 0, file.size_bytes, file.size_bytes, 1)
        return
    batch_bytes = file.size_bytes // max(batches, 1)
    step = max(1, base.BLOCK_BYTES // max(batch_bytes, 1))
    for start in range(0, batches, step):
        stop = min(start + step, batches)
        yield block(kind, start, stop, (stop - start) * batch_bytes, int(start == 0))


def source_digest(source: SourceConfig) -> str:
    """Digest of the source's content: of names and contents of its files, of names, sizes and tags of its objects.

    The name of a source that is one file says only how it is read, so it may be renamed.

    Taken again after reading, it tells whether the data was changed meanwhile.

    Raises:
        DataError: the source cannot be found or read.
        MissingPackageError: a package for this kind of source is not installed.
    """
    if is_hub(source.path):
        return digest_hub(source)[:32]
    digest = hashlib.sha256()
    for file in find_files(source):
        name = ".".join(file.kind) if Path(file.path) == Path(source.path) else file.name
        digest.update(f"{name}\0{file.size_bytes}\0{_content_tag(file)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _content_tag(file: DataFile) -> str:
    if storage.is_remote(file.path):
        return file.etag
    with reading(file.name), Path(file.path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
