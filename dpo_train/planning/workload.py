"""How many pairs there are and how long they are: from the store's prepared data, from numbers given, or assumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_train.artifacts import Artifact, complete_below, open_artifact
from dpo_train.config import RunConfig
from dpo_train.data.report import REPORT_JSON
from dpo_train.errors import StoreError
from dpo_train.storage import join

ASSUMED_PAIRS, ASSUMED_PROMPT, ASSUMED_ANSWER = 10_000, 220, 80
"""A dialogue's lengths, as the benchmarks have them (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths are means, in tokens."""

    train_pairs: int
    validation_pairs: int
    heldout_pairs: int
    prompt_tokens: float
    answer_tokens: float
    """Of one answer."""
    longest_pair: int | None
    """None: unknown."""
    longest_prompt: int | None
    is_even: bool = False
    """All pairs are of these very lengths."""
    origin: str

    @property
    def pair_tokens(self) -> float:
        """The prompt once, and both answers."""
        return self.prompt_tokens + 2 * self.answer_tokens


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line says; None: nothing."""

    pairs: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


def workload_of(config: RunConfig, given: Given) -> Workload:
    """What is given goes before what the store knows, and that before what is assumed."""
    known = _of_store(config)
    found = known or _assumed(config, given.pairs or ASSUMED_PAIRS)
    if given.pairs is not None and known is not None:
        found = replace(found, **_split(config, given.pairs))
    changes: dict[str, Any] = {
        name: float(value)
        for name, value in (("prompt_tokens", given.prompt_tokens), ("answer_tokens", given.answer_tokens))
        if value is not None
    }
    if changes:
        changes |= {"longest_pair": None, "longest_prompt": None}
    origin = _origin(known, given)
    return replace(found, **changes, origin=origin)


def _origin(known: Workload | None, given: Given) -> str:
    says = {"pairs": given.pairs, "prompt-tokens": given.prompt_tokens, "answer-tokens": given.answer_tokens}
    parts = {f"--{name}" for name, value in says.items() if value is not None}
    lacking = [name for name, value in says.items() if value is None]
    rest = "" if not lacking else known.origin if known else f"assumed: give --{', --'.join(lacking)}"
    return "; ".join(filter(None, (", ".join(sorted(parts)), rest)))


def _assumed(config: RunConfig, pairs: int) -> Workload:
    return Workload(
        **_split(config, pairs),
        prompt_tokens=min(ASSUMED_PROMPT, config.prepare.max_prompt_tokens),
        answer_tokens=min(ASSUMED_ANSWER, config.prepare.max_answer_tokens),
        longest_pair=None,
        longest_prompt=None,
        origin="assumed",
    )


def _split(config: RunConfig, pairs: int) -> dict[str, Any]:
    """Pairs of each split, as the config divides and limits them."""
    prepare = config.prepare
    limits = {
        "validation": (prepare.validation_fraction, prepare.max_validation_pairs),
        "heldout": (prepare.heldout_fraction, prepare.max_heldout_pairs),
    }
    apart = {name: math.ceil(pairs * fraction) for name, (fraction, _) in limits.items()}
    train = max(1, pairs - sum(apart.values()))
    found = {f"{name}_pairs": min(count, limits[name][1] or count) for name, count in apart.items()}
    return {"train_pairs": min(train, prepare.max_train_pairs or train), **found}


def _of_store(config: RunConfig) -> Workload | None:
    """What the newest prepared data say that were made by this config's ``prepare``."""
    try:
        homes = complete_below(join(config.store, "prepare"))
        found = [artifact for artifact in map(open_artifact, homes) if _is_of(config, artifact)]
    except (StoreError, OSError):
        return None
    if not found:
        return None
    newest = max(found, key=_age)
    report = json.loads(newest.file(REPORT_JSON).read_text(encoding="utf-8"))
    lengths, counts = report["lengths"], newest.record.counts
    return Workload(
        train_pairs=counts["pairs/train"],
        validation_pairs=counts["pairs/validation"],
        heldout_pairs=counts["pairs/heldout"],
        prompt_tokens=lengths["prompt"]["mean"],
        answer_tokens=(lengths["pair"]["mean"] - lengths["prompt"]["mean"]) / 2,
        longest_pair=int(lengths["pair"]["max"]),
        longest_prompt=int(lengths["prompt"]["max"]),
        is_even=lengths["pair"]["min"] == lengths["pair"]["max"],
        origin=f"measured: {newest.address}",
    )


def _age(artifact: Artifact) -> float:
    return artifact.file(REPORT_JSON).stat().st_mtime


def _is_of(config: RunConfig, artifact: Artifact) -> bool:
    """Whether the lengths and splits of the output are this config's."""
    made: Mapping[str, Any] = artifact.record.config
    names = ("validation_fraction", "heldout_fraction", "max_train_pairs", "max_prompt_tokens", "max_answer_tokens")
    wanted = json.loads(json.dumps({name: getattr(config.prepare, name) for name in names}))
    return artifact.record.stage == "prepare" and all(made.get(name) == value for name, value in wanted.items())
