"""What the prepare stage is given: where it lies, its content, and what of it makes an output this one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from dpo_train import storage
from dpo_train.config import PrepareConfig, RunConfig, SourceConfig
from dpo_train.data.folder import model_folder
from dpo_train.data.ngrams import read_prompts
from dpo_train.data.sources import source_digest
from dpo_train.data.tokens import TokenOptions
from dpo_train.errors import ConfigError


def writes_the_day(config: RunConfig) -> bool:
    """Whether the chat template asks for today's date (Llama 3.2's does) and no option of it fixes one."""
    section = config.prepare
    if section.template != "chat" or any("date" in name for name in section.template_options or {}):
        return False
    own = chat_template(config)
    if own is not None:
        return "strftime_now" in own
    folder = model_folder(config.model.path)
    files = [folder / "tokenizer_config.json", *folder.rglob("*.jinja"), folder / "chat_template.json"]
    return any("strftime_now" in file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def check_apart(config: RunConfig) -> None:
    """Our outputs would be read as data, and grow while they are read.

    Raises:
        ConfigError: the store lies in a data folder.
    """
    for source in config.prepare.all_sources:
        data, store = source.path.rstrip("/") + "/", config.store.rstrip("/") + "/"
        if "*" not in data and store.startswith(data):
            raise ConfigError(
                f"The store {config.store} lies in the data folder {source.path}",
                fix="set `store` to a folder elsewhere, or name the data files",
            )


def label(source: SourceConfig) -> str:
    """A source's name for people: the end of a path here, the whole of an address."""
    return source.path if "://" in source.path else Path(source.path).name


def set_names(config: RunConfig) -> list[str]:
    """The name of each source's pairs in reports and rules; of two with one name the later gets its number."""
    names: list[str] = []
    for index, source in enumerate(config.prepare.all_sources):
        name = source.name or label(source)
        names.append(f"{name} ({index})" if name in names else name)
    return names


def data_digests(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """Digest of each source's content, by its name in a record: ``data``, or ``data/0`` and so on for several."""
    names = ["data"] if len(sources) == 1 else [f"data/{index}" for index in range(len(sources))]
    return dict(zip(names, map(source_digest, sources), strict=True))


def chat_template(config: RunConfig) -> str | None:
    """The text of the user's own chat template.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = config.prepare.chat_template
    if path is None:
        return None
    try:
        return _read_file(path, "prepare.chat_template").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The chat template {path} is not UTF-8 text", got=str(error), fix="save it as UTF-8"
        ) from None


def token_options(section: PrepareConfig, template: str | None) -> TokenOptions:
    """How pairs become tokens, with the text of the user's own template."""
    return TokenOptions(
        template=section.template,
        chat_template=template,
        template_options=section.template_options or {},
        max_prompt_tokens=section.max_prompt_tokens,
        max_answer_tokens=section.max_answer_tokens,
        prompt_truncation=section.prompt_truncation,
        answer_truncation=section.answer_truncation,
    )


def evaluation_prompts(config: RunConfig) -> list[str]:
    path = config.prepare.evaluation_prompts
    return [] if path is None else read_prompts(_read_file(path, "prepare.evaluation_prompts"), path)


def _read_file(path: str, option: str) -> bytes:
    if storage.is_remote(path):
        return storage.read_bytes(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", fix=f"set {option} to a file") from None


def digest_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
