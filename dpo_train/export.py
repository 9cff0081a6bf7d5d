"""A trained or registered model as a plain Hugging Face folder, here or at s3://, on request also on a hub and as GGUF.

    output of a training --adapters merged--> \\
                                               model folder --dtype, converter--> FOLDER --> hub
    registered version ----downloaded-------> /

The folder is whole or absent: it is made beside its place and moved there at the end.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_train import storage
from dpo_train.data.folder import MODEL_FOLDER, model_folder
from dpo_train.disk import disk_errors, is_hidden
from dpo_train.errors import MissingPackageError, ModelError, RunError, StoreError, UserError, first_line
from dpo_train.named_models import NamedModel

Dtype = Literal["float32", "bfloat16", "float16"]

CONVERTERS = ("convert_hf_to_gguf.py", "convert_hf_to_gguf", "convert-hf-to-gguf")
"""Names under which llama.cpp's converter gets installed."""

_GGUF_TYPES = {None: "auto", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PATH_KEYS = {"_name_or_path", "name_or_path", "base_model_name_or_path"}


class HubError(UserError):
    """The model hub cannot be reached, or refuses."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where a folder is pushed to. Private unless wished otherwise: what was public for a minute stays known."""

    repository: str
    public: bool = False


def export(
    source: NamedModel,
    target: str,
    *,
    dtype: Dtype | None = None,
    gguf: bool = False,
    hub: Hub | None = None,
    chat_template: str | None = None,
    end_ids: Sequence[int] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """Writes the model to ``target``: weights, config, generation config, tokenizer, and README.md if it has one.

    Args:
        target: a folder that is empty or does not exist, here or at s3://.
        dtype: of the weights; default: as they are stored, which for what was trained is float32.
        gguf: whether llama.cpp's converter writes ``<name of the folder>.gguf`` into it.
        hub: a repository of a model hub to push the folder to, in one commit.
        chat_template: the template that a training's output was trained with, where it is not its tokenizer's.
        end_ids: tokens that end answers in a training's data, at which generation ends too.
        tell: gets a line before each step.

    Returns:
        the files' sizes in bytes, by name.

    Raises:
        StoreError: something is there already, or it cannot be written.
        MissingPackageError: no converter is installed.
        HubError: the hub refuses; the folder is complete if that happens after it was written.
        RunError: the converter failed, or merging the adapter changed what the model computes.
    """
    _check_free(target)
    converter = _find_converter() if gguf else None
    if hub is not None:
        _ask_hub(hub, lambda api: api.whoami())
    with _scratch(target) as scratch:
        folder = scratch / storage.name_of(target)
        tell(f"writing {source.about}")
        _write(source, folder, dtype, chat_template, end_ids)
        if converter is not None:
            tell(f"converting by {converter}")
            _convert(converter, folder, dtype)
        sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
        for name in sizes:  # safetensors gives its files to their owner alone
            (folder / name).chmod((folder / "config.json").stat().st_mode)
        lies = _move(folder, target)
        if hub is not None:
            tell(f"pushing to {hub.repository}")
            _push(lies, hub)
    return sizes


def _check_free(target: str) -> None:
    """Raises:
    StoreError: the target is a file, a mount point, or a folder with something in it.
    """
    if storage.is_remote(target):
        storage.check_access(target, write=True)
        is_used = bool(storage.list_files(target.rstrip("/") + "/"))
    else:
        path = Path(target)
        if path.is_mount():
            raise _mounted(target)
        is_used = any(path.iterdir()) if path.is_dir() else path.exists()
    if is_used:
        raise StoreError(
            f"There is something at {target} already", expected="an empty folder, or none", fix="name another"
        )


@contextmanager
def _scratch(target: str) -> Iterator[Path]:
    """A folder that is gone afterwards; on the disk of the target, so that moving out of it is a renaming."""
    parent = storage.cache_folder() if storage.is_remote(target) else Path(target).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{storage.name_of(target)}.", dir=parent)
    except OSError as error:
        raise StoreError(f"{parent} cannot be written: {error.strerror}", fix="name a folder of yours") from None
    with scratch as path, disk_errors(parent):
        yield Path(path)


def _write(
    source: NamedModel, folder: Path, dtype: Dtype | None, chat_template: str | None, end_ids: Sequence[int]
) -> None:
    if source.weights is None:
        _copy(model_folder(source.model.path), folder, dtype)
    else:
        made = folder.parent / "merged"
        _merge(source, made, chat_template, end_ids)
        if dtype is None:
            (made / MODEL_FOLDER).rename(folder)
        else:
            _copy(made / MODEL_FOLDER, folder, dtype)
            shutil.rmtree(made)
    for file in folder.glob("*.json"):
        _strip_paths(file)


def _merge(source: NamedModel, made: Path, chat_template: str | None, end_ids: Sequence[int]) -> None:
    """The training's policy as a model folder ``made/model``, with the licence that came with its base."""
    from dpo_train.data.tokens import load_tokenizer
    from dpo_train.model.export import export_policy
    from dpo_train.registry import licence_files

    assert source.weights is not None
    base = model_folder(source.model.path)
    tokenizer = load_tokenizer(base, trust_remote_code=source.model.trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    made.mkdir()
    export_policy(source.model, source.weights, made, tokenizer, end_ids=end_ids)
    for file in licence_files(base):
        shutil.copyfile(file, made / MODEL_FOLDER / file.name)


def _copy(source: Path, folder: Path, dtype: Dtype | None) -> None:
    """A model folder's files, its weights in ``dtype``."""
    for name in _names(source):
        if dtype is None or not name.endswith(_WEIGHTS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    if dtype is not None:
        _write_weights(source, folder, dtype)
        config = folder / "config.json"
        _write_json(config, _with_dtype(json.loads(config.read_text(encoding="utf-8")), dtype))


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not is_hidden(path, folder))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _write_weights(source: Path, folder: Path, dtype: Dtype) -> None:
    """One weight after another, so that a model of any size needs one file's worth of memory.

    Raises:
        ModelError: a number does not fit: float16 ends at 65504.
    """
    import torch

    from dpo_train.model.weight_files import WeightFiles, WeightWriter

    count = 0
    with WeightFiles(source) as files:
        writer = WeightWriter(folder)
        for name in files.names:
            stored = files.read(name)
            weight = stored.to(getattr(torch, dtype)) if stored.is_floating_point() else stored
            if weight.isinf().any() and not stored.isinf().any():
                raise ModelError(f"The weight {name} does not fit into {dtype}", fix="export it as bfloat16")
            writer.add(name, weight)
            count += weight.numel()
        writer.finish(count)


def _with_dtype(config: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """A config that says in which dtype its weights are; models made of several have a config for each."""
    nested = {key: _with_dtype(value, dtype) for key, value in config.items() if _has_dtype(value)}
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**kept, **nested, "dtype": dtype}


def _has_dtype(value: object) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint({"dtype", "torch_dtype"})


def _strip_paths(file: Path) -> None:
    """Takes out where the base lay on this machine."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    if (kept := _without_paths(content)) != content:
        _write_json(file, kept)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Models made of several have a config for each, in which the same stands."""
    kept = {k: v for k, v in config.items() if not (k in _PATH_KEYS and Path(str(v)).is_absolute())}
    return {key: _without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move(folder: Path, target: str) -> Path:
    """Brings the folder to its place, and returns where its files lie on this machine."""
    if storage.is_remote(target):
        _upload(folder, target)
        return folder
    try:
        return folder.replace(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise StoreError(f"Someone else has written to {target} meanwhile", fix="name another folder") from None
        if error.errno == errno.EBUSY:
            raise _mounted(target) from None
        raise


def _mounted(target: str) -> StoreError:
    return StoreError(f"{target} is a mount point, in whose place no folder can be put", fix="name a folder in it")


def _upload(folder: Path, target: str) -> None:
    """``config.json`` last: without it this is no model folder. After a failure nothing is left."""
    names = [name for name in _names(folder) if name != "config.json"]
    place = storage.Mirror(target.rstrip("/"), folder)
    try:
        place.publish(*names)
        place.publish("config.json")
    except BaseException:
        storage.delete([storage.join(target, name) for name in (*names, "config.json")])
        raise


def _find_converter() -> str:
    found = next(filter(None, map(shutil.which, CONVERTERS)), None)
    if found is None:
        raise MissingPackageError(
            "GGUF needs llama.cpp's converter",
            got=f"none of {', '.join(CONVERTERS)} on the PATH",
            fix="clone https://github.com/ggml-org/llama.cpp, `pip install` its requirements.txt, and put its folder "
            "on the PATH",
        )
    return found


def _convert(converter: str, folder: Path, dtype: Dtype | None) -> None:
    """Raises:
    RunError: the converter failed, in its own last words, or left nothing.
    """
    file = folder / f"{folder.name}.gguf"
    command = [converter, str(folder), "--outfile", str(file), "--outtype", _GGUF_TYPES[dtype]]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RunError(
            f"{converter} did not write {file.name}: {said[:300]}",
            got=f"exit code {done.returncode}",
            fix="see whether llama.cpp knows this kind of model, or export without --gguf",
        )


def _push(folder: Path, hub: Hub) -> None:
    """One commit: whole or not at all. Weights of an earlier push that are no part of it go with the same commit."""

    def push(api: Any) -> None:
        api.create_repo(hub.repository, private=not hub.public, exist_ok=True)
        api.upload_folder(
            repo_id=hub.repository,
            folder_path=folder,
            commit_message="Export by dpo",
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.gguf"],
        )

    _ask_hub(hub, push)


def _ask_hub(hub: Hub, question: Callable[[Any], Any]) -> None:
    from huggingface_hub import HfApi

    try:
        question(HfApi())
    except Exception as error:
        raise HubError(
            f"The model hub does not take {hub.repository}: {first_line(error)[:300]}",
            fix="check the name, the network, and HF_TOKEN or `hf auth login`: the token must be one that may write",
        ) from error
