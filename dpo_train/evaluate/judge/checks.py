"""What of a judge can be known to be wrong before anything is trained, and what of it decides its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo_train.config import EndpointJudge, FunctionJudge, JudgeConfig
from dpo_train.data.folder import model_folder, weights_digest
from dpo_train.errors import ConfigError, ModelError
from dpo_train.evaluate.judge import prompts
from dpo_train.evaluate.judge.functions import find, module_of

PATH = "evaluate.judge.path"


def check(config: JudgeConfig) -> None:
    """Looks at all that a judge needs, but for whether its server answers.

    Raises:
        ConfigError: the function, the prompt, the key or the address cannot be used, or limits contradict prices.
        ModelError: the reward model cannot be had, or rewards nothing.
    """
    if isinstance(config, FunctionJudge):
        find(config.function)
    elif isinstance(config, EndpointJudge):
        prompts.load(config.prompt)
        api_key(config)
        _check_address(config.url)
        if config.max_cost is not None and not (config.price_per_million_input or config.price_per_million_output):
            raise ConfigError(
                "evaluate.judge.max_cost has no meaning without prices",
                fix="set evaluate.judge.price_per_million_input and price_per_million_output, or max_requests instead",
            )
    else:
        _check_reward_model(model_folder(config.path, PATH))


def identity(config: JudgeConfig) -> Mapping[str, Any]:
    """All that decides a judge's answers, by content: not where it lies, how fast it may be asked or what it costs."""
    if isinstance(config, FunctionJudge):
        return {"kind": config.kind, "function": config.function, "source": _source_digest(config.function)}
    if isinstance(config, EndpointJudge):
        names = ("kind", "url", "model", "temperature", "max_answer_tokens")
        prompt = hashlib.sha256(prompts.load(config.prompt).encode()).hexdigest()[:32]
        return {name: getattr(config, name) for name in names} | {"prompt": prompt}
    return dataclasses.asdict(config) | {"path": weights_digest(model_folder(config.path, PATH))}


def api_key(config: EndpointJudge) -> str:
    """The key in the environment; empty where the server wants none.

    Raises:
        ConfigError: the variable is not set, or holds what no HTTP header can.
    """
    name = config.api_key_variable
    if not name:
        return ""
    if name not in os.environ:
        raise ConfigError(
            f"There is no key for the judge: the environment variable {name} is not set",
            fix=f"export {name}=..., or name another one in evaluate.judge.api_key_variable; where the server wants no "
            "key, set that to ''",
        )
    key = os.environ[name].strip()
    if not (key.isascii() and (key.isprintable())):
        raise ConfigError(f"The environment variable {name} holds characters that no key for the judge can have")
    return key


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none, a bracket that is not closed
        raise _not_an_address(url) from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "evaluate.judge.url holds a user name or password, which would be recorded with the run",
            fix="take it out and give the key in the environment (evaluate.judge.api_key_variable)",
        )
    if not is_whole or parts.query or parts.fragment or any(character.isspace() for character in url):
        raise _not_an_address(url)


def _not_an_address(url: str) -> ConfigError:
    # Behind a "?" there may be a key.
    return ConfigError(
        "evaluate.judge.url is not the address of a server",
        got=repr(url.partition("?")[0]),
        expected="http:// or https://, a host, and the path before /chat/completions, e.g. https://host/v1",
    )


def _check_reward_model(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A config of the Hugging Face layout names its outputs only where they are not two.
    outputs = len(content["id2label"]) if "id2label" in content else content.get("num_labels", 2)
    names = [str(name) for name in content.get("architectures") or []]
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ModelError(
            f"The model in {folder} rewards nothing",
            got=", ".join(names),
            expected="a model for sequence classification with one output",
            fix=f"set {PATH} to a reward model",
        )
    if outputs != 1:
        raise ModelError(
            f"The model in {folder} does not give one reward",
            got=f"num_labels={outputs}",
            expected="num_labels=1",
            fix=f"set {PATH} to a reward model",
        )


def _source_digest(function: str) -> str:
    """Of the file that defines the function: other code is another judge."""
    module = module_of(function)
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise ConfigError(f"The judge's module {module} has no file", got=f"evaluate.judge.function={function}")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:32]
