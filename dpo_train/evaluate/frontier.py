"""The sweep as a picture: what is gained against how far the policy has moved for it (arXiv 2305.18290, figure 2).

trials --picture--> Picture --draw--> frontier.png
                            --to_html--> frontier.html ; the numbers are in trials.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_train.config import SelectConfig
from dpo_train.disk import write_atomically
from dpo_train.evaluate.frontier_page import to_html
from dpo_train.evaluate.frontier_picture import KL, METRICS, Mark, Picture, limits, picture
from dpo_train.evaluate.trials import Choice, Trial
from dpo_train.evaluate.trials_file import TRIALS_FILE, to_dict

FRONTIER_PNG = "frontier.png"
FRONTIER_HTML = "frontier.html"

_MOST_CHARS = 40  # of a line of the legend
_GREY, _DARK = "#888888", "#222222"


def write_frontier(trials: Sequence[Trial], choice: Choice | None, config: SelectConfig, folder: Path) -> None:
    """Writes ``trials.json``, ``frontier.png`` and ``frontier.html``."""
    content = to_dict(trials, choice, config)
    drawn = picture(trials, choice, config)
    write_atomically(folder / TRIALS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    draw(drawn, folder / FRONTIER_PNG)
    write_atomically(folder / FRONTIER_HTML, to_html(trials, choice, config, drawn))


def draw(drawn: Picture, path: Path) -> None:
    """The picture as a PNG."""
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.figure import Figure

    rows = 2 if drawn.curves else 1
    figure = Figure(figsize=(7.2, 4.4 * rows - 0.8 * (rows - 1)), layout="constrained")
    grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    _draw_marks(grid[0], drawn)
    if drawn.curves:
        _draw_curves(grid[1], drawn)
    figure.savefig(path, format="png", dpi=150)


def _draw_marks(axes: Any, drawn: Picture) -> None:
    if not drawn.marks and not drawn.ways:
        axes.text(0.5, 0.5, "no setting came to its end", ha="center", transform=axes.transAxes)
    frontier = [mark for mark in drawn.marks if mark.is_frontier]
    axes.plot([m.x.value for m in frontier], [m.y.value for m in frontier], color=_GREY, linewidth=1, zorder=1)
    if any(mark.seeds for mark in frontier):
        low, high = [mark.y.low for mark in frontier], [mark.y.high for mark in frontier]
        axes.fill_between(
            [mark.x.value for mark in frontier], low, high, color=_GREY, alpha=0.15, linewidth=0, zorder=0
        )
    _draw_ways(axes, drawn)
    for mark in drawn.marks:
        look = drawn.looks[mark.name]
        fill = look.colour if mark.is_within else "white"
        _draw_bars(axes, mark, look.colour)
        for x, y in mark.seeds:
            axes.plot(x, y, look.shape, color=look.colour, markersize=3, alpha=0.6)
        axes.plot(
            mark.x.value, mark.y.value, look.shape, color=look.colour, markerfacecolor=fill, markersize=8, zorder=3
        )
        if mark.is_chosen:
            axes.plot(mark.x.value, mark.y.value, "o", color=_DARK, fillstyle="none", markersize=15, zorder=4)
            axes.annotate(
                "chosen", (mark.x.value, mark.y.value), (0, 11), textcoords="offset points", ha="center", zorder=5
            )
    others = [0.0] if drawn.x_label == KL else []
    axes.set_xlim(limits(drawn.all_x, *others))
    axes.set_ylim(limits(drawn.all_y))
    if drawn.budget is not None:
        axes.axvline(drawn.budget, color=_DARK, linewidth=1, linestyle="--", label="budget of KL")
    axes.set_xlabel(drawn.x_label)
    axes.set_ylabel(drawn.y_label)
    _legend(axes, drawn)


def _draw_ways(axes: Any, drawn: Picture) -> None:
    """Thin, with a dot at each step that was measured; a cross where halving stopped it."""
    for way in drawn.ways:
        colour = drawn.looks[way.name].colour
        x, y = [kl.value for kl in way.kl], [found.value for found in way.metric]
        axes.plot(x, y, ".-", color=colour, linewidth=0.8, markersize=4, alpha=0.8, zorder=1)
        if way.is_stopped:
            axes.plot(x[-1], y[-1], "x", color=colour, markersize=6, zorder=3)
        if way.has_seeds and len(x) > 1:
            low, high = [one.low for one in way.metric], [one.high for one in way.metric]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, zorder=0)


def _draw_bars(axes: Any, mark: Mark, colour: str) -> None:
    axes.plot([mark.x.low, mark.x.high], [mark.y.value] * 2, color=colour, linewidth=1, alpha=0.6, zorder=2)
    axes.plot([mark.x.value] * 2, [mark.y.low, mark.y.high], color=colour, linewidth=1, alpha=0.6, zorder=2)


def _draw_curves(axes: Any, drawn: Picture) -> None:
    for curve in drawn.curves:
        colour = drawn.looks[curve.name].colour
        values = [estimate.value for estimate in curve.accuracy]
        axes.plot(curve.steps, values, f"{drawn.looks[curve.name].shape}-", color=colour, markersize=4)
        if curve.has_seeds:
            low, high = [e.low for e in curve.accuracy], [e.high for e in curve.accuracy]
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(limits(estimate for curve in drawn.curves for estimate in curve.accuracy))
    axes.set_xlabel("step")
    axes.set_ylabel(METRICS["accuracy"])


def _legend(axes: Any, drawn: Picture) -> None:
    from matplotlib.lines import Line2D

    for words, colour, shape in _keys(drawn):
        # A longer one would leave no room for the picture.
        label = words if len(words) <= _MOST_CHARS else f"{words[:_MOST_CHARS]}..."
        axes.add_line(Line2D([], [], color=colour, marker=shape, linestyle="", label=label))
    lines, labels = axes.get_legend_handles_labels()
    if not lines:
        return
    found = axes.legend(lines, labels, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in found.get_texts():
        text.set_parse_math(False)


def _keys(drawn: Picture) -> Iterator[tuple[str, str, str]]:
    yield from ((words, colour, "o") for words, colour in drawn.colours)
    yield from ((words, _DARK, shape) for words, shape in drawn.shapes)
    if any(way.is_stopped for way in drawn.ways):
        yield "stopped early", _DARK, "x"
