"""Checks JSON against the models of the generated client: no unknown field, every value of its type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import kfp_server_api
from dateutil.parser import isoparse

_PLAIN = {"str": str, "bool": bool, "int": int, "float": (int, float)}
REQUIRED: dict[str, tuple[str, ...]] = {
    "V2beta1Run": ("display_name", "experiment_id", "pipeline_version_reference", "runtime_config"),
    "V2beta1PipelineVersionReference": ("pipeline_id", "pipeline_version_id"),
    "V2beta1Experiment": ("display_name",),
    "V2beta1Pipeline": ("display_name",),
    "V2beta1RecurringRun": (
        "display_name", "experiment_id", "pipeline_version_reference", "runtime_config", "trigger", "mode",
        "max_concurrency", "no_catchup",
    ),
    "V2beta1CronSchedule": ("cron",),
}  # fmt: skip
"""Of requests. Kubeflow would fill in some of them; ours are always complete."""


class MessageError(ValueError):
    """JSON that is not the message that it should be."""


def check(kind: str, value: Any, *, request: bool = False, place: str = "") -> None:
    """Raises MessageError where the value is not of the kind, in the generated client's words for kinds."""
    place = place or kind
    if kind == "object":
        return
    if kind == "datetime":
        if not isinstance(value, str):
            raise MessageError(f"{place}: {value!r} is no time")
        isoparse(value)
    elif kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise MessageError(f"{place}: {value!r} is no {kind}")
    elif found := re.fullmatch(r"list\[(.*)\]", kind):
        _is(value, list, place)
        for index, item in enumerate(value):
            check(found[1], item, request=request, place=f"{place}[{index}]")
    elif found := re.fullmatch(r"dict\(str, (.*)\)", kind):
        _is(value, dict, place)
        for key, item in value.items():
            check(found[1], item, request=request, place=f"{place}.{key}")
    else:
        _check_model(kind, value, request=request, place=place)


def _check_model(kind: str, value: Any, *, request: bool, place: str) -> None:
    model = getattr(kfp_server_api, kind)
    if not model.openapi_types:
        if value not in model.allowable_values:
            raise MessageError(f"{place}: {value!r} is none of {model.allowable_values}")
        return
    _is(value, dict, place)
    names: Mapping[str, str] = {key: name for name, key in model.attribute_map.items()}
    if unknown := value.keys() - names.keys():
        raise MessageError(f"{place}: unknown fields {sorted(unknown)}")
    if request and (missing := [name for name in REQUIRED.get(kind, ()) if name not in value]):
        raise MessageError(f"{place}: without {missing}")
    for key, item in value.items():
        check(model.openapi_types[names[key]], item, request=request, place=f"{place}.{key}")


def _is(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        raise MessageError(f"{place}: {value!r:.80} is no {kind.__name__}")
