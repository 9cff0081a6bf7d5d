"""A model's folder and the digests of what lies in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dpo_train import storage
from dpo_train.disk import digest_path, is_hidden
from dpo_train.errors import ModelError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".index.json")


def model_folder(path: str) -> Path:
    """The local folder of a model: the path itself, or a copy of what lies at s3:// or on the hub, fetched if need be.

    Raises:
        ModelError: neither a model folder nor a hub name that can be reached.
    """
    folder = _fetched(path) if storage.is_remote(path) else Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is not a model folder", expected="config.json, *.safetensors and a tokenizer in it"
            )
        return folder
    if folder.is_absolute():
        raise ModelError(f"There is no model folder {folder}", fix="set model.path to a folder or a hub name")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"The model {path!r} is neither a folder here nor to be had from the hub ({first_line})",
            fix="check the name and the network, or download it and give its folder",
        ) from None


def _fetched(path: str) -> Path:
    """A copy of the folder, in the cache under what it holds now: other content is another folder."""
    entries = [entry for entry in storage.list_files(path.rstrip("/") + "/") if entry.size]
    if not entries:
        raise ModelError(f"There is no model at {path}", fix="set model.path to a folder or a hub name")
    names = {entry.path: entry.path.removeprefix(path.rstrip("/") + "/") for entry in entries}
    content = "".join(f"{names[entry.path]}\0{entry.size}\0{entry.etag}\0" for entry in entries)
    folder = storage.cache_folder() / "models" / hashlib.sha256(content.encode()).hexdigest()[:16]
    copy = storage.Mirror(path.rstrip("/"), folder)
    for entry in entries:
        copy.fetch(names[entry.path], size=entry.size)
    return folder


def weights_digest(folder: Path) -> str:
    """Digest of everything in the folder that may be loaded: weights, config and tokenizer."""
    return _digest(folder, _loaded(folder))


def tokenizer_digest(folder: Path) -> str:
    """Digest of all that may be loaded but the weights, so that pairs are not made again when only weights change.

    Tokenizers come under too many file names to list, some in sub-folders (``additional_chat_templates/*.jinja``); a
    config among them costs nothing but a needless prepare.
    """
    return _digest(folder, [file for file in _loaded(folder) if not file.name.endswith(_WEIGHTS)])


def _loaded(folder: Path) -> list[Path]:
    """All files below the folder but hidden ones and what is for people to read."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p, folder) and not _is_prose(p.name))


def _is_prose(name: str) -> bool:
    return name.lower().endswith(".md") or name.upper().startswith("LICENSE")


def _digest(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{digest_path(file)}\0".encode())
    except OSError as error:
        raise ModelError(f"The model in {folder} cannot be read: {error}", fix="check its permissions") from None
    return digest.hexdigest()[:32]
