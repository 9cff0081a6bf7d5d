"""The page of the report, from its JSON content. Text from data and models is shown as text, whatever it holds.

P: held-out pairs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from dpo_train.data.report_page import visible
from dpo_train.evaluate import plots
from dpo_train.evaluate import report_rows as rows
from dpo_train.evaluate.report_rows import number
from dpo_train.evaluate.report_template import PAGE, STYLE

Floats = npt.NDArray[np.float64]
Json = Mapping[str, Any]

MOST_CHARS = 4000
"""Of a prompt or an answer; report.json has the whole text."""
MOST_NAME_CHARS = 200
OPEN_SAMPLES = 20
"""More of them are folded away."""

OUTCOMES = {
    "passed": "\N{CHECK MARK} passed",
    "failed": "\N{BALLOT X} failed",
    "undecided": "? undecided",
    "not_applied": "\N{EN DASH} does not apply",
}


def to_html(content: Json, margins_P: Floats, length_differences_P: npt.NDArray[Any], history: Sequence[Json]) -> str:
    """One self-contained page without scripts, which loads nothing.

    Args:
        content: of report.json.
        margins_P: reward margins of all held-out pairs.
        length_differences_P: of the same pairs, tokens of the chosen minus tokens of the rejected answer.
        history: steps of the training.
    """
    # Whatever the template prints goes through ``visible``, so that no place can forget it.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize)
    environment.filters |= {"number": number, "place": _place, "width": _width, "name": _name}
    findings, heldout = content["findings"], content["findings"]["heldout"]
    filled = {
        **content,
        "style": Markup(STYLE),  # noqa: S704 - our own text
        "style_digest": "sha256-" + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
        "headline": _headline(content["verdict"]),
        "outcomes": OUTCOMES,
        "share": rows.SHARE,
        "champion": findings["champion"],
        "heldout": rows.of_set(heldout),
        "sets": [rows.of_set(part) for part in findings["sets"]],
        "outside": any(not part["is_trained_on"] for part in (*findings["sets"], heldout)),
        "divergence": rows.of_divergence(findings["divergence"]),
        "sampled": rows.of_samples(findings["samples"]),
        "comparisons": [rows.of_comparison(comparison) for comparison in findings["comparisons"]],
        "samples": [_sample(sample) for sample in content["samples"]],
        "open_samples": OPEN_SAMPLES,
        "drawn": number(len(margins_P)),
        "plots": {
            "margins": plots.margins(margins_P),
            "lengths": plots.lengths(margins_P, length_differences_P),
            "reliability": plots.reliability(heldout["reliability"]),
            "training": plots.training(history),
        },
    }
    return environment.from_string(PAGE).render(filled)


def _headline(verdict: Json) -> dict[str, str]:
    """The verdict in one line: its kind (an outcome), a title and a sentence."""
    outcomes = [rule["outcome"] for rule in verdict["rules"]]
    failed, undecided = outcomes.count("failed"), outcomes.count("undecided")
    if verdict["passed"]:
        return {
            "kind": "passed",
            "title": "Passed.",
            "text": "Every rule that applies holds: the model may be registered.",
        }
    if not verdict["learned"]:
        text = "On held-out pairs the policy is not better than chance. Nothing is registered."
        return {"kind": "failed", "title": "Not learned.", "text": text}
    counts = [
        f"{n} {'rule' if n == 1 else 'rules'} {what}" for n, what in ((failed, "failed"), (undecided, "undecided")) if n
    ]
    text = f"The policy learned, but not every rule holds: {', '.join(counts) or 'see below'}. Nothing is registered."
    return {"kind": "failed" if failed else "undecided", "title": "Refused by the gate.", "text": text}


def _sample(sample: Json) -> dict[str, Any]:
    return {
        "prompt": _cut(sample["prompt"]),
        "answers": [
            {"who": who, "note": sample["notes"].get(who, ""), **_cut(answer)}
            for who, answer in sample["answers"].items()
        ],
    }


def _cut(text: str) -> dict[str, Any]:
    """At most MOST_CHARS of a text, and how many there are if it is cut."""
    return {"text": text[:MOST_CHARS] or "(empty)", "of": len(text) if len(text) > MOST_CHARS else None}


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _place(value: float, scale: Json) -> float:
    """Where a value lies on a scale, from 0 to 100; what lies outside is at its end."""
    share = (value - scale["low"]) / (scale["high"] - scale["low"])
    return round(100 * float(min(1.0, max(0.0, share))), 2)


def _width(found: Json, scale: Json) -> float:
    return round(_place(found["high"], scale) - _place(found["low"], scale), 2)


def _name(text: str) -> str:
    return text if len(text) <= MOST_NAME_CHARS else f"{text[:MOST_NAME_CHARS]}\N{HORIZONTAL ELLIPSIS}"
