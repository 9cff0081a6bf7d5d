"""The report: report.json for machines, report.html for people (one file, plots inside), and flat metrics for records.

P: held-out pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_train.disk import write_atomically
from dpo_train.evaluate.report_page import to_html
from dpo_train.findings import Comparison, Estimate, Findings, SampleFindings, SetFindings, Verdict
from dpo_train.report_file import REPORT_HTML, REPORT_JSON, SCHEMA_VERSION

Floats = npt.NDArray[np.float64]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9_. -]{0,58}[A-Za-z0-9_-])?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt with the answers to it."""

    prompt: str
    answers: Mapping[str, str]
    """By who gave them, in the order to show: "chosen (data)", "reference", "policy", "champion"."""
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By the same names a few words on an answer: "won against reference", "cut off"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that an evaluation found."""

    findings: Findings
    verdict: Verdict
    samples: Sequence[Sample]
    margins_P: Floats
    """Reward margins of all held-out pairs."""
    length_differences_P: npt.NDArray[Any]
    """Tokens of the chosen minus tokens of the rejected answer, of the same pairs."""
    history: Sequence[Mapping[str, float]]
    """Steps of the training."""
    identity: Mapping[str, str]
    """By name the digests of what was evaluated."""


def write_report(report: Report, folder: Path) -> None:
    """Writes both files."""
    content = to_dict(report)
    plotted = report.margins_P, report.length_differences_P, report.history
    write_atomically(folder / REPORT_JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / REPORT_HTML, to_html(content, *plotted))


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON types, without the numbers of single pairs and steps. What is not finite becomes None."""
    return {
        "schema_version": SCHEMA_VERSION,
        "findings": _finite(dataclasses.asdict(report.findings)),
        "verdict": _finite(dataclasses.asdict(report.verdict)),
        "samples": [
            {"prompt": sample.prompt, "answers": dict(sample.answers), "notes": dict(sample.notes)}
            for sample in report.samples
        ],
        "identity": dict(report.identity),
    }


def metrics(findings: Findings) -> dict[str, float]:
    """The numbers by flat names for records, MLflow and Kubeflow: ``heldout/accuracy``, ``set/<name>/accuracy``,
    ``samples/kl``, ``judge/<opponent>/win_rate`` and so on, the bounds of intervals as ``_low`` and ``_high``.

    Samples and judge: at the first temperature only. Left out: what is not finite, and a win rate with a problem.
    """
    found: dict[str, Estimate | float | None] = dict(_set_numbers("heldout", findings.heldout))
    for part in findings.sets:
        found |= _set_numbers(f"set/{_metric_name(part.name)}", part)
    if findings.divergence:
        found |= {"samples/kl": findings.divergence.kl, "samples/kl_per_token": findings.divergence.per_token}
    # The first of each name wins: temperatures stand in the order of the config.
    for sampled in reversed(findings.samples):
        prefix = "samples" if sampled.model == "policy" else f"samples/{sampled.model}"
        found |= _sample_numbers(prefix, sampled)
    for comparison in reversed(findings.comparisons):
        found |= _judge_numbers(f"judge/{_metric_name(comparison.opponent)}", comparison)
    return dict(_flat(found))


def _set_numbers(prefix: str, part: SetFindings) -> dict[str, Estimate | float | None]:
    bias = part.length_bias
    return {
        f"{prefix}/accuracy": part.accuracy,
        f"{prefix}/margin": part.margin,
        f"{prefix}/reward_chosen": part.chosen_reward,
        f"{prefix}/reward_rejected": part.rejected_reward,
        f"{prefix}/calibration_error": part.calibration_error,
        f"{prefix}/length_correlation": bias.correlation,
        f"{prefix}/prefers_longer": bias.prefers_longer,
        f"{prefix}/likelihood_gain": part.likelihood.difference,
        f"{prefix}/champion_gain": part.champion.difference if part.champion else None,
        f"{prefix}/drop": part.drop,
    }


def _sample_numbers(prefix: str, sampled: SampleFindings) -> dict[str, Estimate | float | None]:
    names = ("length", "length_ratio", "repetition", "distinct_1", "distinct_2", "empty", "truncated")
    return {f"{prefix}/{name}": getattr(sampled, name) for name in names}


def _judge_numbers(prefix: str, comparison: Comparison) -> dict[str, Estimate | float | None]:
    return {
        f"{prefix}/win_rate": None if comparison.problem else comparison.win_rate,
        f"{prefix}/unjudged": float(comparison.unjudged),
        f"{prefix}/first_wins": comparison.first_wins,
        f"{prefix}/agreement": comparison.agreement,
    }


def _flat(numbers: Mapping[str, Estimate | float | None]) -> Iterator[tuple[str, float]]:
    for name, found in numbers.items():
        if isinstance(found, Estimate):
            parts = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        else:
            parts = {} if found is None else {name: found}
        yield from ((part, value) for part, value in parts.items() if math.isfinite(value))


def _metric_name(name: str) -> str:
    """A name as MLflow takes it, and no other name's.

    What is short and plain stays. Else a digest goes behind a colon, which no plain name has.
    """
    if _PLAIN_NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', name)[:40]}:{digest}"


def _finite(value: Any) -> Any:
    """The tree with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
