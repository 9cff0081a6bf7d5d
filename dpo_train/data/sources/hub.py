"""Data sets of the Hugging Face hub, and folders of data files, as `datasets.load_dataset` reads them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import pyarrow as pa

from dpo_train.config import SourceConfig
from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block, Record
from dpo_train.data.sources.streams import reading
from dpo_train.data.sources.tables import read_batches
from dpo_train.errors import DataError, MissingPackageError, first_line

PREFIX = "hf://"
SLICE_ROWS = 512


def is_hub(path: str) -> bool:
    """Whether a source's path names a data set for `datasets`."""
    return path.startswith(PREFIX)


def plan_hub(source: SourceConfig, index: int) -> list[Block]:
    """Runs of rows of about BLOCK_BYTES. Loads the data set into the local cache of `datasets`.

    Raises:
        DataError: it cannot be loaded.
        MissingPackageError: `datasets` is not installed.
    """
    address, data = _address(source), _load(source.path, source.hub_config, source.hub_split)
    name = f"{source.path.removeprefix(PREFIX)}/{source.hub_split}"
    if not len(data):
        return []
    row_bytes = max(1, data.data.nbytes // len(data))
    rows = max(1, base.BLOCK_BYTES // row_bytes)
    bounds = [(start, min(start + rows, len(data))) for start in range(0, len(data), rows)]
    return [
        Block(index, name, address, "hub", "", start, stop, (stop - start) * row_bytes, start + 1)
        for start, stop in bounds
    ]


def read_hub(block: Block) -> Generator[Record, None, int]:
    """The rows of the block, as Arrow stores them: no picture or sound is decoded.

    Raises:
        DataError: the data set cannot be loaded, or is another one by now.
    """
    path, _, query = block.path.partition("?")
    options = parse_qs(query)
    data = _load(path, options.get("config", [None])[0], options["split"][0])
    if len(data) < block.stop:
        raise DataError(
            f"{block.name} changed while it was read", got=f"{len(data)} rows", expected=f"at least {block.stop}"
        )
    with reading(block.name):
        return (yield from read_batches(_slices(data, block.start, block.stop), block.first_line))


def digest_hub(source: SourceConfig) -> str:
    """Digest of the loaded rows' files and of which rows they are.

    Raises:
        DataError: the data set cannot be loaded.
    """
    data = _load(source.path, source.hub_config, source.hub_split)
    digest = hashlib.sha256(f"{source.hub_config}\0{source.hub_split}\0{len(data)}".encode())
    with reading(source.path):
        for file in data.cache_files:
            with Path(file["filename"]).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _slices(data: Any, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    tables = data.with_format("arrow")
    for at in range(start, stop, SLICE_ROWS):
        yield from tables[at : min(at + SLICE_ROWS, stop)].to_batches()


def _address(source: SourceConfig) -> str:
    options = {"split": source.hub_split, **({"config": source.hub_config} if source.hub_config else {})}
    return f"{source.path}?{urlencode(options, quote_via=quote)}"


@functools.lru_cache(maxsize=4)
def _load(path: str, config: str | None, split: str) -> Any:
    """Once per process: a worker reads many blocks of one data set."""
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(f"{path} needs the package `datasets`", fix="pip install 'dpo-train[hub]'") from None
    try:
        return datasets.load_dataset(path.removeprefix(PREFIX), config, split=split)
    except Exception as error:  # whatever the network, the hub or a builder raises
        raise DataError(
            f"The data set {path} cannot be loaded: {first_line(error)}",
            fix="check its name, prepare.hub_config and prepare.hub_split; a private one needs the variable HF_TOKEN",
        ) from None
