"""What of a config a cluster cannot see, or must not be told: found on the laptop, before anything is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from dpo_train.cluster.kubeflow.login import is_local
from dpo_train.config import EndpointJudge, RewardModelJudge, RunConfig, to_text
from dpo_train.config.judging import DEFAULT_PROMPTS
from dpo_train.errors import ConfigError
from dpo_train.tracking import redacted

_TAGGED = re.compile(r"[^\s@]*[^/\s@:](:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")


def check_reach(config: RunConfig) -> None:
    """Whether pods of a cluster can read and write what the config names.

    Raises:
        ConfigError: one of its places is on this machine, or an address holds a login.
    """
    mounts = tuple(config.cluster.volumes)
    here = {name: path for name, path in _places(config) if _is_here(path, mounts)}
    if here:
        raise ConfigError(
            "The cluster cannot see places on this machine",
            got=", ".join(f"{name}={path}" for name, path in here.items()),
            expected="s3://..., a name on the hub, or a path below one of cluster.volumes",
            fix="put them there, and name them so in the config",
        )
    local = {name: uri for name, uri in _addresses(config).items() if _means_here(uri, mounts)}
    if local:
        raise ConfigError(
            "In the cluster these addresses mean another machine than this",
            got=", ".join(f"{name}={redacted(uri)}" for name, uri in local.items()),
            fix="use addresses that the cluster's pods reach",
        )
    if secret := _with_logins(json.loads(to_text(config))):
        raise ConfigError(
            "The config travels as an argument of the run, which everybody who sees the run can read, and an address "
            "in it holds a login or a key",
            got=", ".join(secret),
            fix=f"put the login into the Secret {config.kubeflow.secret}, e.g. as MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD",
        )


def check_logins(arguments: Mapping[str, Any]) -> None:
    """Whether a run's other arguments may be read by everybody who sees the run.

    Raises:
        ConfigError: an address in one holds a login or a key.
    """
    if secret := _with_logins(arguments):
        raise ConfigError(
            "Everybody who sees the run can read its arguments, and an address in one holds a login or a key",
            got=", ".join(secret),
            fix="put the login into the Secret kubeflow.secret",
        )


def check_volumes(volumes: Mapping[str, str]) -> None:
    """Whether Kubeflow can mount these claims into the pipeline's tasks.

    Raises:
        ConfigError: it cannot.
    """
    # Kubeflow's driver calls a pod's volume as the claim is called, and a volume's name has no dots.
    if dotted := [claim for claim in volumes.values() if "." in claim]:
        raise ConfigError(
            "Kubeflow cannot mount a volume claim whose name has a dot into a task",
            got=f"cluster.volumes: {', '.join(dotted)}",
            fix="make the claim under a name without dots",
        )


def check_image(image: str, origin: str) -> None:
    """Whether an image's name says which of its versions is meant.

    Raises:
        ConfigError: it does not.
    """
    if not _TAGGED.fullmatch(image):
        raise ConfigError(
            f"{origin} names no version of an image, and what `latest` means changes",
            got=image,
            expected="registry/name:tag, or better registry/name@sha256:...",
        )


def _places(config: RunConfig) -> Iterator[tuple[str, str]]:
    prepare, judge = config.prepare, config.evaluate.judge
    optional: dict[str, str | None] = {
        "store": config.store,
        "model.path": config.model.path,
        "model.adapter": config.model.adapter,
        "prepare.path": prepare.path,
        **{f"prepare.sources[{index}].path": source.path for index, source in enumerate(prepare.sources)},
        "prepare.chat_template": prepare.chat_template,
        "prepare.evaluation_prompts": prepare.evaluation_prompts,
        "evaluate.judge.path": judge.path if isinstance(judge, RewardModelJudge) else None,
        "evaluate.judge.prompt": (
            judge.prompt if isinstance(judge, EndpointJudge) and judge.prompt not in DEFAULT_PROMPTS else None
        ),
    }
    yield from ((name, path) for name, path in optional.items() if path is not None)


def _with_logins(tree: Any, place: str = "") -> list[str]:
    """Where in JSON types there are addresses with logins or keys."""
    if isinstance(tree, Mapping):
        return [found for key, item in tree.items() for found in _with_logins(item, f"{place}.{key}".lstrip("."))]
    if isinstance(tree, list):
        return [found for index, item in enumerate(tree) for found in _with_logins(item, f"{place}[{index}]")]
    return [place] if isinstance(tree, str) and redacted(tree) != tree else []


def _is_here(path: str, mounts: tuple[str, ...]) -> bool:
    """The config's paths are absolute; what is left without a slash before it is a name on the hub."""
    path = path.removeprefix("file://")
    return path.startswith("/") and not _is_mounted(path, mounts)


def _is_mounted(path: str, mounts: tuple[str, ...]) -> bool:
    parts = PurePosixPath(path)
    return ".." not in parts.parts and any(parts.is_relative_to(mount) for mount in mounts)


def _addresses(config: RunConfig) -> Mapping[str, str]:
    judge = config.evaluate.judge
    optional = {
        "tracking.uri": config.tracking.uri,
        "storage.endpoint": config.storage.endpoint,
        "evaluate.judge.url": judge.url if isinstance(judge, EndpointJudge) else None,
        "cluster.address": config.cluster.address if config.cluster.launcher == "ray" else None,
    }
    return {name: uri for name, uri in optional.items() if uri is not None}


def _means_here(uri: str, mounts: tuple[str, ...]) -> bool:
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        # sqlite:///relative and sqlite:////absolute
        return not _is_mounted(rest.removeprefix("/"), mounts)
    if scheme == "file" or not rest:
        return not _is_mounted(rest or uri, mounts)
    return is_local(urlsplit(uri).hostname)
