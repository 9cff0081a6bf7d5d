"""What a recipe found: figures, the paper's claims with intervals, and what was done otherwise than in the paper.

Results --write--> results.json, results.md, a PNG per figure
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_train.disk import write_atomically
from dpo_train.findings import Estimate

RESULTS_JSON, RESULTS_MD = "results.json", "results.md"

Verdict = Literal["holds", "does not hold", "not decided"]

_COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#222222", "#bbbbbb")
_SHAPES = "osD^vP*X"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot of a figure. ``x`` is an estimate where it was measured, else what was set."""

    label: str
    x: Estimate | float
    y: Estimate

    @property
    def place(self) -> float:
        return self.x.value if isinstance(self.x, Estimate) else self.x


@dataclass(frozen=True, kw_only=True)
class Series:
    """A method's dots."""

    name: str
    points: tuple[Point, ...]
    is_line: bool = True


@dataclass(frozen=True, kw_only=True)
class Figure:
    """``name`` is its file's."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    level: float | None = None
    """A horizontal line to compare with, such as a win rate of one half."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper and what was found of it: it holds where the whole interval lies above 0."""

    text: str
    found: Estimate

    @property
    def verdict(self) -> Verdict:
        if self.found.low > 0:
            return "holds"
        return "does not hold" if self.found.high < 0 else "not decided"


@dataclass(frozen=True, kw_only=True)
class Results:
    """Of one run of a recipe."""

    recipe: str
    title: str
    figures: tuple[Figure, ...]
    claims: tuple[Claim, ...]
    deviations: tuple[str, ...]
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    """Single numbers that no figure shows."""
    notes: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Config, sizes, model, versions, machine."""


def write(results: Results, folder: Path) -> None:
    """Writes all files; what was there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in results.figures:
        draw(figure, folder / f"{figure.name}.png")
    content = dataclasses.asdict(results)
    for told, claim in zip(content["claims"], results.claims, strict=True):
        told["verdict"] = claim.verdict
    write_atomically(folder / RESULTS_MD, to_markdown(results))
    write_atomically(folder / RESULTS_JSON, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(results: Results) -> str:
    """The results as a page to read."""
    lines = [f"# {results.title}", ""]
    for figure in results.figures:
        lines += [f"![{figure.title}]({figure.name}.png)", "", f"{figure.title}.", ""]
    if results.claims:
        lines += ["| claim | found (95 % interval) | |", "|---|---|---|"]
        lines += [f"| {claim.text} | {_shown(claim.found)} | {claim.verdict} |" for claim in results.claims]
        lines.append("")
    if results.numbers:
        lines += ["| number | value (95 % interval) | n |", "|---|---|---|"]
        lines += [f"| {name} | {_shown(found)} | {found.n} |" for name, found in results.numbers.items()]
        lines.append("")
    for figure in results.figures:
        lines += [f"## {figure.title}", "", f"| | {figure.x_label} | {figure.y_label} | n |", "|---|---|---|---|"]
        for series in figure.series:
            for point in series.points:
                x = _shown(point.x) if isinstance(point.x, Estimate) else f"{point.x:g}"
                lines.append(f"| {series.name}: {point.label} | {x} | {_shown(point.y)} | {point.y.n} |")
        lines.append("")
    lines += ["## Otherwise than in the paper", "", *(f"- {text}" for text in results.deviations), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {text}" for text in results.notes), ""]
    return "\n".join(lines)


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def draw(figure: Figure, path: Path) -> None:
    """A figure as a PNG."""
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8.0, 4.8), layout="constrained")
    axes = canvas.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    if figure.level is not None:
        axes.axhline(figure.level, color="#888888", linewidth=1, linestyle="--")
    for place, series in enumerate(figure.series):
        colour, shape = _COLOURS[place % len(_COLOURS)], _SHAPES[place % len(_SHAPES)]
        points = sorted(series.points, key=lambda point: point.place)
        for point in points:
            axes.plot([point.place] * 2, [point.y.low, point.y.high], color=colour, linewidth=0.8, alpha=0.5)
            if isinstance(point.x, Estimate):
                axes.plot([point.x.low, point.x.high], [point.y.value] * 2, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(
            [point.place for point in points],
            [point.y.value for point in points],
            shape + ("-" if series.is_line else ""),
            color=colour,
            markersize=5,
            linewidth=1,
            label=series.name,
        )
    axes.set_title(figure.title, fontsize=10)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    canvas.savefig(path, format="png", dpi=150)
