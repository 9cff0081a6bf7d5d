"""Secrets by the names of their keys, and images. What a Secret holds is never looked at, kept or shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from dpo_train import storage
from dpo_train.cluster.doctor.answers import Answer, failed, passed, unchecked
from dpo_train.cluster.doctor.api import find, in_namespace
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kubeflow.reach import check_image
from dpo_train.config import EndpointJudge, RunConfig
from dpo_train.errors import ConfigError

REGISTRY_KINDS = ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg")

KNOWN = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN", "HF_ENDPOINT", "OPENAI_API_KEY", "DPO_WEBHOOK_URL", "RAY_AUTH_TOKEN",
)  # fmt: skip
"""Variables that are read here, or by the libraries that log in."""

MISNAMED = {
    "AWS_ACCESS_KEY": "AWS_ACCESS_KEY_ID", "AWS_KEY_ID": "AWS_ACCESS_KEY_ID", "ACCESS_KEY": "AWS_ACCESS_KEY_ID",
    "ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "ACCESSKEY": "AWS_ACCESS_KEY_ID", "S3_ACCESS_KEY": "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_KEY": "AWS_SECRET_ACCESS_KEY", "SECRET_KEY": "AWS_SECRET_ACCESS_KEY",
    "SECRETKEY": "AWS_SECRET_ACCESS_KEY", "SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "S3_SECRET_KEY": "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_SECRET_KEY": "AWS_SECRET_ACCESS_KEY",
    "AWS_TOKEN": "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN": "AWS_SESSION_TOKEN",
    "S3_ENDPOINT": "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL": "AWS_ENDPOINT_URL", "AWS_ENDPOINT": "AWS_ENDPOINT_URL",
    "MLFLOW_USERNAME": "MLFLOW_TRACKING_USERNAME", "MLFLOW_USER": "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_PASSWORD": "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TOKEN": "MLFLOW_TRACKING_TOKEN",
    "HUGGINGFACE_TOKEN": "HF_TOKEN", "HF_API_TOKEN": "HF_TOKEN", "HUGGING_FACE_TOKEN": "HF_TOKEN",
    "OPENAI_KEY": "OPENAI_API_KEY",
}  # fmt: skip
"""Keys that people write, and what is read instead."""

PAIRS = (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"))
"""One of two is no login."""

TASKS_JUDGE_KEYS = ("OPENAI_API_KEY", "HF_TOKEN")
"""Of the names that a judge's key may have those that the pipeline's tasks get (``components.SECRET_KEYS``)."""

_CLOSE = 0.88
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def secret(name: str) -> Callable[[Kube, RunConfig], Answer]:
    """A check of one of ``cluster.secrets``."""

    def look(kube: Kube, config: RunConfig) -> Answer:
        keys = _keys(kube, name)
        if keys is None:
            return failed(
                f"there is no Secret {name} in {kube.namespace}",
                f"{_create(kube, name, _suggested(config))}; where roles of the cluster stand in for logins, set "
                f"cluster.secrets=[]{_without(config, name)}",
            )
        elsewhere = [*config.cluster.environment, *_others(kube, config, name)]
        return judged(name, keys, elsewhere, _wanted(config), kube.namespace)

    return look


def task_secret(kube: Kube, config: RunConfig) -> Answer:
    """The Secret of Kubeflow's tasks, which they can do without."""
    name = config.kubeflow.secret
    for variable in _wanted(config):
        if variable not in TASKS_JUDGE_KEYS:
            return failed(
                f"tasks of Kubeflow get no {variable}, which the judge needs",
                f"call the key {TASKS_JUDGE_KEYS[0]} in Secret {name}, and set evaluate.judge.api_key_variable to that",
            )
    keys = _keys(kube, name)
    if keys is None:
        return unchecked(
            f"there is no Secret {name} in {kube.namespace}, which is right where roles stand in for logins",
            f"if not, {_create(kube, name, _suggested(config))}",
        )
    return judged(name, keys, (), _wanted(config), kube.namespace)


def judged(name: str, keys: Iterable[str], elsewhere: Iterable[str], wanted: Iterable[str], namespace: str) -> Answer:
    """Whether keys of these names are of use. Pure.

    Args:
        elsewhere: variables that pods have from somewhere else.
        wanted: variables that the config asks for by name.
    """
    own = sorted(keys)
    known, there = {*KNOWN, *wanted}, {*own, *elsewhere}
    wrong = [text for key in own if (text := _mistake(key, known, there)) is not None]
    # A key that is wrong is the one that is missing: that is said once.
    if not wrong:
        wrong = [f"{has} without {lacks}" for pair in PAIRS for has, lacks in (pair, pair[::-1])
                 if has in own and lacks not in there]  # fmt: skip
        wrong += [f"no {variable}, which the judge needs" for variable in wanted if variable not in there]
    if not own:
        wrong = ["no key at all"]
    if wrong:
        return failed(
            f"Secret {name} in {namespace} has {'; '.join(wrong)}",
            f"write it again with these names: kubectl -n {namespace} edit secret {name}",
        )
    return passed(f"{name} in {namespace} has {', '.join(own)}")


def pull_secret(name: str) -> Callable[[Kube, RunConfig], Answer]:
    """A check of one of ``cluster.image_pull_secrets``."""

    def look(kube: Kube, _: RunConfig) -> Answer:
        found = find(kube, in_namespace(kube, "secrets", name))
        kind = None if found is None else str(found.get("type", ""))
        create = f"kubectl -n {kube.namespace} create secret docker-registry {name} --docker-server=..."
        if kind is None:
            return failed(f"there is no Secret {name} in {kube.namespace}", create)
        if kind not in REGISTRY_KINDS:
            return failed(f"Secret {name} is of type {kind}, and no registry's login", f"delete it, then {create}")
        return passed(f"{name} in {kube.namespace} is a registry's login")

    return look


def image(config: RunConfig, key: str) -> Answer:
    """Whether an image is named, by a version; that it can be pulled, only a pod can show."""
    named = config.cluster.image or config.kubeflow.image if key == "cluster.image" else config.kubeflow.image
    if named is None:
        return failed(f"{key} names no image that holds dpo", f"set {key}, best with its digest")
    try:
        check_image(named, key)
    except ConfigError:
        return failed(
            f"{named} names no version, and what `latest` means changes",
            f"set {key} to name:tag or, better, name@sha256:...",
        )
    how = "by its digest" if "@sha256:" in named else "by its tag"
    return passed(f"{named}, {how}; that nodes can pull it shows only when a pod runs")


def _keys(kube: Kube, name: str) -> tuple[str, ...] | None:
    """The names of a Secret's keys; None: there is no such Secret."""
    found = find(kube, in_namespace(kube, "secrets", name))
    return None if found is None else tuple(found.get("data") or {})


def _others(kube: Kube, config: RunConfig, name: str) -> list[str]:
    """The keys of the other Secrets, which become variables of the same pods."""
    return [key for other in config.cluster.secrets if other != name for key in _keys(kube, other) or ()]


def _mistake(key: str, known: set[str], there: set[str]) -> str | None:
    if not _VARIABLE.fullmatch(key):
        return f"the key {key}, which can be no variable's name"
    if key in known:
        return None
    expected = MISNAMED.get(key.upper()) or _near(key, known)
    # Beside the right one it does no harm.
    return None if expected is None or expected in there else f"the key {key}, which nobody reads; expected {expected}"


def _near(key: str, known: set[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key.upper(), sorted(known), n=1, cutoff=_CLOSE)), None)


def _wanted(config: RunConfig) -> tuple[str, ...]:
    judge = config.evaluate.judge
    return (judge.api_key_variable,) if isinstance(judge, EndpointJudge) and judge.api_key_variable else ()


def _suggested(config: RunConfig) -> tuple[str, ...]:
    """What a Secret for this config would hold."""
    places = (config.store, config.model.path, *(source.path for source in config.prepare.all_sources))
    s3 = PAIRS[0] if any(map(storage.is_remote, places)) and not config.storage.anonymous else ()
    mlflow = PAIRS[1] if (config.tracking.uri or "").startswith("http") else ()
    return (*s3, *mlflow, *_wanted(config)) or PAIRS[0]


def _create(kube: Kube, name: str, keys: tuple[str, ...]) -> str:
    return (
        f"put {', '.join(keys)} into a file of NAME=VALUE lines, and: "
        f"kubectl -n {kube.namespace} create secret generic {name} --from-env-file=FILE"
    )


def _without(config: RunConfig, name: str) -> str:
    return "" if config.cluster.secrets == (name,) else f" without {name}"
