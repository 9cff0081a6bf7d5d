"""Kinds of values that a key may have, and how a key is declared."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, ConfigDict, Field


def check_alias(alias: str) -> str:
    """An alias that MLflow takes."""
    if not re.fullmatch(r"(?!latest$|v?\d+$)[\w-]+", alias):
        raise ValueError("is no alias that MLflow takes: letters, digits, - and _, but not `latest`, `v1` or `1`")
    return alias


Seed = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
ModelName = Annotated[str, Field(pattern=r"^[^/:'\"]+$")]
# MLflow keeps "latest" and v1, v2, ... for itself; a number names a version.
Alias = Annotated[str, AfterValidator(check_alias)]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def option(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A dataclass field with a help text; without a default the key is required."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
