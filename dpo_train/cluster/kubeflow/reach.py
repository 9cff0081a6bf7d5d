"""What of a config a cluster cannot see, or must not be told: found on the laptop, before anything is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dpo_train.cluster.kubeflow.login import is_local
from dpo_train.config import EndpointJudge, RunConfig, to_text
from dpo_train.config.places import is_mounted, lost_paths
from dpo_train.errors import ConfigError
from dpo_train.tracking import redacted

_TAGGED = re.compile(r"[^\s@]*[^/\s@:](:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")


def check_reach(config: RunConfig) -> None:
    """Whether pods of a cluster can read and write what the config names.

    Raises:
        ConfigError: one of its places is on this machine, or an address holds a login.
    """
    if here := lost_paths(config):
        raise ConfigError(
            "The cluster cannot see places on this machine",
            got=", ".join(f"{name}={path}" for name, path in here.items()),
            expected="s3://..., a name on the hub, or a path below one of cluster.volumes",
            fix="put them there, and name them so in the config",
        )
    local = {name: uri for name, uri in _addresses(config).items() if _means_here(uri, config)}
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


def _with_logins(tree: Any, place: str = "") -> list[str]:
    """Where in JSON types there are addresses with logins or keys."""
    if isinstance(tree, Mapping):
        return [found for key, item in tree.items() for found in _with_logins(item, f"{place}.{key}".lstrip("."))]
    if isinstance(tree, list):
        return [found for index, item in enumerate(tree) for found in _with_logins(item, f"{place}[{index}]")]
    return [place] if isinstance(tree, str) and redacted(tree) != tree else []


def _addresses(config: RunConfig) -> Mapping[str, str]:
    judge = config.evaluate.judge
    optional = {
        "tracking.uri": config.tracking.uri,
        "storage.endpoint": config.storage.endpoint,
        "evaluate.judge.url": judge.url if isinstance(judge, EndpointJudge) else None,
        "cluster.address": config.cluster.address if config.cluster.launcher == "ray" else None,
    }
    return {name: uri for name, uri in optional.items() if uri is not None}


def _means_here(uri: str, config: RunConfig) -> bool:
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        # sqlite:///relative and sqlite:////absolute
        return not is_mounted(rest.removeprefix("/"), config)
    if scheme == "file" or not rest:
        return not is_mounted(rest or uri, config)
    return is_local(urlsplit(uri).hostname)
