"""YAML text to a config and back."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from dpo_train.config.checks import check
from dpo_train.config.judging import DEFAULT_PROMPTS, EndpointJudge, JudgeConfig, RewardModelJudge
from dpo_train.config.run import RunConfig
from dpo_train.decoding import apply_override, decode, parse_yaml
from dpo_train.errors import ConfigError


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies ``section.key=value`` overrides.

    Relative paths are taken from the current folder and made absolute, because workers run elsewhere.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has a wrong type or value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The config {path} cannot be read: {error}", fix="give the path of a YAML file; `dpo init` writes one"
        ) from None
    return parse_config(text, overrides, origin=str(path))


def parse_config(text: str, overrides: typing.Sequence[str] = (), *, origin: str = "the config") -> RunConfig:
    """The same from YAML (or JSON) text."""
    tree = parse_yaml(text, origin)
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} is not a mapping", got=type(tree).__name__, expected="sections such as `model:`")
    for override in overrides:
        apply_override(tree, override)
    config = decode(tree, RunConfig, origin)
    check(config, origin)
    return _absolute(config)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def to_text(config: RunConfig) -> str:
    """A config as one line of JSON that ``parse_config`` reads back.

    kfp.local rewrites the text ``python3`` in arguments and takes ``{{$`` for a placeholder; both are written as JSON
    escapes so that no path or name is damaged on the way into a pipeline step.
    """
    text = json.dumps(to_dict(config))
    return text.replace("python3", "\\u0070ython3").replace("{{$", "\\u007b{$")


def _absolute(config: RunConfig) -> RunConfig:
    replace = dataclasses.replace
    prepare = config.prepare
    prepare = replace(
        prepare,
        path=_absolute_or_none(prepare.path),
        sources=tuple(replace(source, path=_absolute_path(source.path)) for source in prepare.sources),
        chat_template=_absolute_or_none(prepare.chat_template),
        evaluation_prompts=_absolute_or_none(prepare.evaluation_prompts),
    )
    return replace(
        config,
        store=_absolute_path(config.store.rstrip("/") or "/"),
        model=replace(
            config.model, path=_absolute_model(config.model.path), adapter=_absolute_or_none(config.model.adapter)
        ),
        prepare=prepare,
        evaluate=replace(config.evaluate, judge=_absolute_judge(config.evaluate.judge)),
        storage=replace(config.storage, cache=_absolute_or_none(config.storage.cache)),
    )


def _absolute_judge(judge: JudgeConfig | None) -> JudgeConfig | None:
    if isinstance(judge, RewardModelJudge):
        return dataclasses.replace(judge, path=_absolute_model(judge.path))
    if isinstance(judge, EndpointJudge) and judge.prompt not in DEFAULT_PROMPTS:
        return dataclasses.replace(judge, prompt=_absolute_path(judge.prompt))
    return judge


def _absolute_model(path: str) -> str:
    """A hub name ("org/model") stays as it is unless a folder of that name exists here."""
    is_here = path.startswith((".", "/", "~")) or Path(path).expanduser().exists()
    return _absolute_path(path) if is_here else path


def _absolute_path(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _absolute_or_none(path: str | None) -> str | None:
    return None if path is None else _absolute_path(path)
