"""A model's folder and the digests of what lies in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dpo_train import storage
from dpo_train.artifacts import open_artifact
from dpo_train.disk import digest_path, is_hidden
from dpo_train.errors import ModelError, StoreError

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
"""What a training's output holds: one of both."""

ADAPTER_CONFIG = "adapter_config.json"

LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
"""How the names of files begin that say under which terms a model is given, in capitals."""

# <store>/<stage>/<digest>/model; to look for a record beside every other model as well would be a request for nothing.
_STORED = re.compile(rf"(.+/[a-z_]+/[0-9a-f]{{16}})/{MODEL_FOLDER}/?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".index.json")


def model_folder(path: str, option: str = "model.path") -> Path:
    """The local folder of a model: the path itself, or a copy of what lies at s3:// or on the hub, fetched if need be.

    ``option`` is where the path was given.

    Raises:
        ModelError: neither a model folder nor a hub name that can be reached.
    """
    fix = f"set {option} to a folder or a hub name"
    folder = _of_output(path) or fetched(path, "model", fix) if storage.is_remote(path) else Path(path)
    if folder.is_dir():
        return _checked(folder)
    if folder.is_absolute():
        raise ModelError(f"There is no model folder {folder}", fix=fix)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
        prose = [_in_any_case(name) for name in ("README.MD", *(f"{name}*" for name in LICENCE_FILES))]
        snapshot = Path(snapshot_download(path, allow_patterns=patterns + prose))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"The model {path!r} is neither a folder here nor to be had from the hub ({first_line})",
            fix="check the name and the network, or download it and give its folder",
        ) from None
    return _checked(snapshot)


def _in_any_case(name: str) -> str:
    """A pattern of file names, of which the hub's client knows no other kind than by case."""
    return "".join(f"[{letter}{letter.lower()}]" if letter.isalpha() else letter for letter in name)


def _of_output(path: str) -> Path | None:
    """The model of a complete output in a store at s3://: its record lists its files, and no listing is relied on."""
    found = _STORED.fullmatch(path)
    if found is None:
        return None
    try:
        artifact = open_artifact(found[1])
    except StoreError:
        return None  # none of ours after all, or one of which the key may read the model alone
    return artifact.path / MODEL_FOLDER


def _checked(folder: Path) -> Path:
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the base that the adapter names, wherever that lies, and the adapter with it.
        raise ModelError(
            f"{folder} holds an adapter, not a model",
            fix="set model.path to the folder of the model that it was trained on, and model.adapter to this one",
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder", expected="config.json, *.safetensors and a tokenizer in it")
    return folder


def fetched(path: str, what: str, fix: str, names: Sequence[str] | None = None) -> Path:
    """A copy of a folder at s3://, in the cache under what it holds now: other content is another folder.

    Args:
        what: to say that there is none, with ``fix``.
        names: of the files to fetch; default: all.

    Raises:
        ModelError: none of them is there.
    """
    home = path.rstrip("/")
    found = {entry.path.removeprefix(f"{home}/"): entry for entry in storage.list_files(f"{home}/") if entry.size}
    wanted = {name: entry for name, entry in found.items() if names is None or name in names}
    if not wanted:
        raise ModelError(f"There is no {what} at {path}", fix=fix)
    content = "".join(f"{name}\0{entry.size}\0{entry.etag}\0" for name, entry in wanted.items())
    folder = storage.cache_folder() / "models" / hashlib.sha256(content.encode()).hexdigest()[:16]
    copy = storage.Mirror(home, folder)
    for name, entry in wanted.items():
        copy.fetch(name, size=entry.size)
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
    return name.lower().endswith(".md") or name.upper().startswith(LICENCE_FILES)


def _digest(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{digest_path(file)}\0".encode())
    except OSError as error:
        raise ModelError(f"The model in {folder} cannot be read: {error}", fix="check its permissions") from None
    return digest.hexdigest()[:32]
