"""A model's weights on disk, in the Hugging Face layout: one safetensors file, or several and an index.

    model.safetensors
    model-00001-of-00003.safetensors ... and model.safetensors.index.json, which says where each weight is

Read by parts, so that a rank fetches its share and no more; written one weight after another, so that no more than one
file's worth is ever in memory.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_train.disk import write_atomically
from dpo_train.errors import ModelError, first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
"""Of a written file, unless a single weight is larger."""


class WeightFiles(ExitStack):
    """All weights of a folder by name. Nothing is read before it is asked for.

    Raises:
        ModelError: there are none, one of the files is missing, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._slices: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = self.enter_context(safe_open(path, "pt"))
                self._slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            except (OSError, SafetensorError) as error:
                self.close()
                raise ModelError(f"The model in {folder} cannot be loaded: {path.name}: {first_line(error)}") from None

    @property
    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole weight."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, box: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A part of a weight, by dimension, in the dtype it is stored in. It may be a view of the file: copy what is
        to be kept."""
        tensor: Tensor = self._slices[name][box] if self.shape(name) else self._slices[name][...]
        return tensor


def _files(folder: Path) -> list[Path]:
    """As transformers looks for them: the single file first."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except FileNotFoundError:
        raise ModelError(
            f"The model in {folder} cannot be loaded: it has no weights", expected=f"{SINGLE_FILE} or {INDEX_FILE}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {INDEX_FILE}: {first_line(error)}") from None


class WeightWriter:
    """Writes weights in the order they come, a file whenever the next weight would not go into it any more.

    Given the same order, ``save_pretrained`` would split them in the same places.
    """

    def __init__(self, folder: Path, max_file_bytes: int | None = None) -> None:
        self._folder = folder
        self._max_file_bytes = MAX_FILE_BYTES if max_file_bytes is None else max_file_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole weight on the CPU. It may not be changed before ``finish``."""
        self._total_bytes += tensor.nbytes
        if tensor.nbytes > self._max_file_bytes:
            self._write({name: tensor})
            return
        if self._waiting_bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += tensor.nbytes

    def finish(self, num_parameters: int) -> None:
        """Writes what is left, gives the files their names, and writes the index if there are several."""
        if self._waiting:
            self._flush()
        count = len(self._files)
        if count == 1:
            self._partial(1).rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = self._folder / f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(file)
            weight_map |= dict.fromkeys(names, file.name)
        metadata = {"total_parameters": num_parameters, "total_size": self._total_bytes}
        index = {"metadata": metadata, "weight_map": weight_map}
        write_atomically(self._folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        self._write(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0

    def _write(self, tensors: dict[str, Tensor]) -> None:
        self._files.append(list(tensors))
        save_file(tensors, self._partial(len(self._files)), metadata={"format": "pt"})

    def _partial(self, number: int) -> Path:
        """How many files there will be is not known before the end, and so neither are their names."""
        return self._folder / f"model-{number:05d}.partial"
