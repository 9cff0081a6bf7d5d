"""The report: report.json for machines, report.html for people (one file, plots inside)."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dpo_train.artifacts import Estimate, Verdict
from dpo_train.disk import write_atomically
from dpo_train.evaluate.preference import Preferences

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with both answers."""

    prompt: str
    reference: str
    policy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that an evaluation found."""

    beta: float
    preferences: Preferences
    verdict: Verdict
    samples: Sequence[Sample]
    history: Sequence[Mapping[str, float]]
    identity: Mapping[str, str]


def write_report(report: Report, folder: Path) -> None:
    """Writes both files."""
    write_atomically(folder / REPORT_JSON, json.dumps(to_dict(report), indent=2) + "\n")
    write_atomically(folder / REPORT_HTML, to_html(report))


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON types, without the per-pair margins."""
    return {
        "schema_version": SCHEMA_VERSION,
        "beta": report.beta,
        "estimates": {name: dataclasses.asdict(value) for name, value in estimates(report.preferences).items()},
        "verdict": dataclasses.asdict(report.verdict),
        "samples": [dataclasses.asdict(sample) for sample in report.samples],
        "identity": dict(report.identity),
    }


def estimates(preferences: Preferences) -> dict[str, Estimate]:
    """The estimates by the names that people see."""
    return {
        "heldout/accuracy": preferences.accuracy,
        "heldout/margin": preferences.margin,
        "heldout/reward_chosen": preferences.chosen_reward,
        "heldout/reward_rejected": preferences.rejected_reward,
    }


def to_html(report: Report) -> str:
    """One self-contained page; all text from data and model is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        report=report,
        verdict=report.verdict,
        estimates=estimates(report.preferences),
        margins_plot=_plot_margins(report),
        history_plot=_plot_history(report),
    )


def _plot_margins(report: Report) -> str:
    figure, axes = _figure()
    margins_P = report.preferences.margins_P
    # Margins that are all but equal would leave bins of no width.
    room = max(1e-6, 1e-3 * float(np.abs(margins_P).max()))
    axes.hist(margins_P, bins=40, range=(margins_P.min() - room, margins_P.max() + room), color="#4477aa")
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlabel("reward margin of a held-out pair (chosen - rejected)")
    axes.set_ylabel("pairs")
    return _png(figure)


def _plot_history(report: Report) -> str:
    figure, axes = _figure()
    steps = [line["step"] + 1 for line in report.history]
    axes.plot(steps, [line["loss"] for line in report.history], color="#4477aa", label="loss")
    measured = [line for line in report.history if "validation/loss" in line]
    if measured:
        at, losses = [line["step"] + 1 for line in measured], [line["validation/loss"] for line in measured]
        axes.plot(at, losses, "o", color="#222222", markersize=4, label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    right = axes.twinx()
    # Both sides, not their difference alone: a margin may also grow while both answers become unlikely.
    for side, color, style in (("margin", "#cc6677", "-"), ("chosen", "#228833", "--"), ("rejected", "#aa3377", ":")):
        values = [line[f"rewards/{side}"] for line in report.history]
        right.plot(steps, values, style, color=color, label=f"reward {side}" if side == "margin" else side)
    right.set_ylabel("reward")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DPO evaluation</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .4rem .6rem; vertical-align: top;
 border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
 .pair { table-layout: fixed } img { max-width: 100% } pre { white-space: pre-wrap; margin: 0;
 font: inherit; unicode-bidi: isolate } .verdict { padding: .8rem 1rem; border-left: .4rem solid } .yes { border-color:
 #228833; background: #eef7ee } .no { border-color: #cc3311; background: #fbeeee } code { font-size: .85em }
</style></head><body>
<h1>DPO evaluation</h1>
<p class="verdict {{ 'yes' if verdict.passed else 'no' }}">
{% if verdict.passed %}<b>Passed.</b> The policy prefers the chosen answers on held-out pairs, and every rule holds.
{% elif verdict.learned %}<b>Refused by the gate.</b> The policy learned, but not every rule holds.
{% else %}<b>Not learned.</b> On held-out pairs the policy is not better than chance.{% endif %}</p>
<h2>Held-out pairs</h2>
<p>Reward: beta &times; log(policy / reference), beta = {{ report.beta }}. Ties count half.</p>
<table><tr><th>measure</th><th>value</th><th>95&nbsp;% interval</th><th>n</th></tr>
{% for name, e in estimates.items() %}<tr><td>{{ name }}</td><td>{{ '%.4f' % e.value }}</td>
<td>{{ '%.4f' % e.low }} to {{ '%.4f' % e.high }}</td><td>{{ e.n }}</td></tr>{% endfor %}</table>
<p><img alt="Histogram of reward margins" src="data:image/png;base64,{{ margins_plot }}"></p>
<h2>Gate</h2>
<table><tr><th>rule</th><th>found</th><th>must exceed</th><th></th></tr>
{% for rule in verdict.rules %}<tr><td>{{ rule.rule }}</td><td>{{ '%.4f' % rule.found }}</td>
<td>{{ rule.must_exceed }}</td><td>{{ 'passed' if rule.passed else 'failed' }}</td></tr>{% endfor %}</table>
<h2>Training</h2>
<p><img alt="Loss and rewards by step" src="data:image/png;base64,{{ history_plot }}"></p>
<h2>Samples</h2>
{% for sample in report.samples %}<table class="pair"><tr><th colspan="2"><pre>{{ sample.prompt }}</pre></th></tr>
<tr><th>reference</th><th>policy</th></tr>
<tr><td><pre>{{ sample.reference }}</pre></td><td><pre>{{ sample.policy }}</pre></td></tr></table>
{% else %}<p>No samples were asked for.</p>{% endfor %}
<h2>Identity</h2>
<table>{% for name, value in report.identity.items() %}<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>
{% endfor %}</table>
</body></html>
"""
