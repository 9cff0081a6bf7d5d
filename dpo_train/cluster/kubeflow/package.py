"""The compiled pipeline: whose content names its version, and which arguments and steps it has."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_train.errors import ConfigError, MissingPackageError, first_line

VERSION_PREFIX = "sha-"
DIGEST_LENGTH = 12
_AT_EXIT = "ALL_UPSTREAM_TASKS_COMPLETED"
"""The strategy of a task that comes whatever has happened before."""
_SEPARATOR = "\n---\n"
"""Between the two documents; Kubeflow's server looks for these very signs."""

_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "STRING": ((str,), "text"),
    "NUMBER_INTEGER": ((int,), "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": ((bool,), "true or false"),
    "LIST": ((list,), "a list, as JSON"),
    "STRUCT": ((dict,), "a mapping, as JSON"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A task that runs in a container of its own."""

    name: str
    path: tuple[str, ...]
    """Argo's nodes from the pipeline's top down to it; more than one where it is within a condition or a loop, or where
    it comes whatever has happened: then ``<task>.onExit`` is before it."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A compiled pipeline."""

    pipeline: Mapping[str, Any]
    platform: Mapping[str, Any]
    """What only Kubernetes knows of (secrets, volumes); empty where there is none."""

    @property
    def text(self) -> str:
        """The YAML that is uploaded."""
        documents = [self.pipeline, self.platform] if self.platform else [self.pipeline]
        return _SEPARATOR.join(yaml.safe_dump(document, sort_keys=True) for document in documents)

    @property
    def canonical(self) -> str:
        """The same text for the same content, also of what a server has read and written again."""
        return json.dumps(canonical(self.pipeline, self.platform), sort_keys=True)

    @property
    def version(self) -> str:
        """Name of its version: a digest of its content."""
        return VERSION_PREFIX + hashlib.sha256(self.canonical.encode()).hexdigest()[:DIGEST_LENGTH]

    @property
    def parameters(self) -> Mapping[str, Mapping[str, Any]]:
        """By name the type, default and description of each argument."""
        inputs: Mapping[str, Any] = self.pipeline["root"].get("inputDefinitions", {})
        found: Mapping[str, Mapping[str, Any]] = inputs.get("parameters", {})
        return found

    @property
    def steps(self) -> tuple[Step, ...]:
        """In an order in which they may run."""
        return tuple(_steps(self.pipeline, self.pipeline["root"], ()))


def load_package(path: Path) -> Package:
    """The compiled pipeline in a file.

    Raises:
        ConfigError: it holds none.
    """
    try:
        documents = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The compiled pipeline {path} cannot be read: {first_line(error)}") from None
    package = _package(documents)
    if package is None:
        raise ConfigError(f"{path} is no compiled pipeline", fix="write one with `dpo compile`")
    return package


def package_of(content: Any) -> Package | None:
    """The pipeline within what the server says of a version or a run; None: there is none that is understood."""
    if isinstance(content, dict) and "pipeline_spec" in content:
        return _package([content["pipeline_spec"], content.get("platform_spec", {})])
    return _package([content])


def with_image(package: Package, image: str) -> Package:
    """The same with another image in every container."""
    changed = copy.deepcopy(dict(package.pipeline))
    for executor in changed["deploymentSpec"]["executors"].values():
        if "container" in executor:
            executor["container"]["image"] = image
    return Package(pipeline=changed, platform=package.platform)


def with_secret(package: Package, name: str) -> Package:
    """The same with the logins of another Kubernetes Secret, wherever one becomes environment variables."""
    changed = copy.deepcopy(dict(package.platform))
    executors = changed.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    for entry in (entry for executor in executors.values() for entry in executor.get("secretAsEnv", [])):
        if any(each["envVar"] == "DPO_WEBHOOK_URL" for each in entry["keyToEnv"]):
            continue  # that of whoever is told, not one of logins
        entry["secretName"] = name
        if "secretNameParameter" in entry:
            entry["secretNameParameter"] = {"runtimeValue": {"constant": name}}
    return Package(pipeline=package.pipeline, platform=changed)


def with_volumes(package: Package, volumes: Mapping[str, str]) -> Package:
    """The same with volume claims in every task's container.

    Args:
        volumes: the claims by the paths where they are mounted.
    """
    if not volumes:
        return package
    changed = copy.deepcopy(dict(package.platform))
    kubernetes = changed.setdefault("platforms", {}).setdefault("kubernetes", {})
    executors = kubernetes.setdefault("deploymentSpec", {}).setdefault("executors", {})
    for label, executor in package.pipeline["deploymentSpec"]["executors"].items():
        if "container" in executor:
            mounts = executors.setdefault(label, {}).setdefault("pvcMount", [])
            mounts[:] = [mount for mount in mounts if mount["mountPath"] not in volumes]
            mounts.extend(_mount(path, claim) for path, claim in sorted(volumes.items()))
    return Package(pipeline=package.pipeline, platform=changed)


def without_cache(package: Package) -> Package:
    """The same with no task that Kubeflow may skip because it has seen its inputs before."""
    changed = copy.deepcopy(dict(package.pipeline))
    components = [changed["root"], *changed.get("components", {}).values()]
    for task in (task for component in components for task in component.get("dag", {}).get("tasks", {}).values()):
        task["cachingOptions"] = {}
    return Package(pipeline=changed, platform=package.platform)


def parse_argument(package: Package, name: str, text: str) -> Any:
    """The value that a text on the command line means for an argument of this type."""
    kind = package.parameters.get(name, {}).get("parameterType", "STRING")
    if kind == "STRING":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text  # of a wrong type, which `check_arguments` says


def check_arguments(package: Package, arguments: Mapping[str, Any]) -> None:
    """Whether a run can start with these; neither the client nor every server looks.

    Of what is in a list or a mapping Kubeflow's language says nothing; there the default is what is compared with.

    Raises:
        ConfigError: one is unknown, missing, of another type, or none of the values that are allowed.
    """
    known = package.parameters
    if unknown := sorted(arguments.keys() - known.keys()):
        raise ConfigError(
            f"The pipeline has no argument {', '.join(unknown)}", expected=", ".join(sorted(known)) or "none"
        )
    missing = [name for name, about in known.items() if name not in arguments and not _is_optional(about)]
    if missing:
        raise ConfigError(f"The pipeline needs a value for {', '.join(sorted(missing))}")
    for name, value in arguments.items():
        types, words = _TYPES.get(known[name]["parameterType"], ((object,), "anything"))
        # In Python, True is a whole number.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
            raise ConfigError(f"The pipeline's argument {name} has another type", got=f"{value!r:.80}", expected=words)
        _check_content(name, value, known[name])


def canonical(pipeline: Mapping[str, Any], platform: Mapping[str, Any]) -> list[Any]:
    """Both documents as Kubeflow's own messages write them: what is empty or a default is not there.

    Raises:
        ConfigError: they are no pipeline.
    """
    try:
        from kfp.pipeline_spec import pipeline_spec_pb2 as messages
    except ImportError:
        raise MissingPackageError("Kubeflow Pipelines is not installed", fix="pip install 'dpo-train[kfp]'") from None
    from google.protobuf import json_format  # type: ignore[import-untyped]

    try:
        parsed = (
            json_format.ParseDict(dict(pipeline), messages.PipelineSpec(), ignore_unknown_fields=False),
            json_format.ParseDict(dict(platform), messages.PlatformSpec(), ignore_unknown_fields=False),
        )
    except json_format.ParseError as error:
        raise ConfigError(f"This is no pipeline that Kubeflow takes: {first_line(error)}") from None
    return [json_format.MessageToDict(message) for message in parsed]


def _package(documents: list[Any]) -> Package | None:
    pipelines = [item for item in documents if isinstance(item, dict) and "pipelineInfo" in item and "root" in item]
    platforms = [item for item in documents if isinstance(item, dict) and "platforms" in item]
    if len(pipelines) != 1 or len(platforms) > 1:
        return None
    return Package(pipeline=pipelines[0], platform=platforms[0] if platforms else {})


def _mount(path: str, claim: str) -> dict[str, Any]:
    """As kfp-kubernetes writes it, by a name and by a parameter: old servers know only the first."""
    return {"mountPath": path, "constant": claim, "pvcNameParameter": {"runtimeValue": {"constant": claim}}}


def _check_content(name: str, value: Any, about: Mapping[str, Any]) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ConfigError(f"The pipeline's argument {name} holds a number that JSON does not have") from None
    allowed = about.get("literals")
    for item in value if isinstance(value, list) else [value]:
        if allowed and item not in allowed:
            raise ConfigError(
                f"The pipeline's argument {name} has a value that is not allowed",
                got=f"{item!r:.80}",
                expected=", ".join(map(str, allowed)),
            )
    for place, item, kinds in _inner(value, about.get("defaultValue")):
        if kinds and _kind(item) not in kinds:
            raise ConfigError(
                f"The pipeline's argument {name} holds something of another type, at {place}",
                got=f"{item!r:.80}",
                expected=f"{' or '.join(sorted(kinds))}, as in its default",
            )


def _inner(value: Any, default: Any) -> Iterator[tuple[str, Any, set[str]]]:
    """The parts of a list or a mapping: where they are, what they are, and the kinds that the default has there."""
    if isinstance(value, list) and isinstance(default, list):
        kinds = {_kind(item) for item in default}
        yield from ((f"[{index}]", item, kinds) for index, item in enumerate(value))
    elif isinstance(value, dict) and isinstance(default, dict):
        yield from ((key, value[key], {_kind(default[key])}) for key in value if default.get(key) is not None)


def _kind(value: Any) -> str:
    # In Python, True is a whole number; JSON has one kind of numbers.
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "nothing")


def _is_optional(about: Mapping[str, Any]) -> bool:
    return bool(about.get("isOptional")) or "defaultValue" in about


def _steps(pipeline: Mapping[str, Any], component: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Step]:
    tasks: dict[str, Any] = dict(component.get("dag", {}).get("tasks", {}))
    done: set[str] = set()
    while tasks:
        # Alphabetical among those whose predecessors are done; the server has made sure that there are no circles.
        name = next((key for key in sorted(tasks) if done.issuperset(_before(tasks[key]))), min(tasks))
        task = tasks.pop(name)
        done.add(name)
        inner = pipeline.get("components", {}).get(task["componentRef"]["name"], {})
        own = (*path, *_hook(task), name)
        if "dag" in inner:
            yield from _steps(pipeline, inner, own)
        else:
            yield Step(name=name, path=own)


def _hook(task: Mapping[str, Any]) -> tuple[str, ...]:
    """To Argo a task that comes whatever has happened is no task, but a hook of the one before it."""
    is_one = task.get("triggerPolicy", {}).get("strategy") == _AT_EXIT
    return tuple(f"{before}.onExit" for before in _before(task)[:1]) if is_one else ()


def _before(task: Mapping[str, Any]) -> list[str]:
    found: list[str] = task.get("dependentTasks", [])
    return found
