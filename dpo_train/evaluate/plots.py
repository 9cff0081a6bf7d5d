"""The report's plots, as PNGs in base64 for a page that loads nothing. P: held-out pairs.

Whatever has names in it is drawn by the page itself: fonts here do not know every script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BLUE, RED, GREEN, PURPLE, DARK = "#4477aa", "#cc6677", "#228833", "#aa3377", "#222222"

_TREND_BINS = 10
_MOST_POINTS = 5000
"""Of a scatter plot: more are a blot, and take a second each 100,000."""


def margins(margins_P: Floats) -> str | None:
    """Histogram of the reward margins; None where none is finite."""
    margins_P = margins_P[np.isfinite(margins_P)]
    if not len(margins_P):
        return None
    figure, axes = _figure()
    # Margins that are all but equal would leave bins of no width.
    room = max(1e-6, 1e-3 * float(np.abs(margins_P).max()))
    axes.hist(margins_P, bins=40, range=(margins_P.min() - room, margins_P.max() + room), color=BLUE)
    axes.axvline(0, color=DARK, linewidth=1)
    axes.axvline(margins_P.mean(), color=RED, linewidth=1.5, linestyle="--", label="mean")
    axes.legend(frameon=False)
    axes.set_xlabel("reward margin of a held-out pair (chosen - rejected)")
    axes.set_ylabel("pairs")
    return _png(figure)


def lengths(margins_P: Floats, differences_P: npt.NDArray[Any]) -> str | None:
    """Margin against the difference in length of each pair, with the mean margin of equally many pairs."""
    finite_P = np.isfinite(margins_P) & np.isfinite(differences_P)
    margins_P, differences_P = margins_P[finite_P], differences_P[finite_P]
    if not len(margins_P):
        return None
    figure, axes = _figure()
    step = -(-len(margins_P) // _MOST_POINTS)
    axes.scatter(differences_P[::step], margins_P[::step], s=6, color=BLUE, alpha=0.35, linewidths=0)
    parts = np.array_split(np.argsort(differences_P, kind="stable"), min(_TREND_BINS, len(margins_P)))
    axes.plot(
        [differences_P[part].mean() for part in parts],
        [margins_P[part].mean() for part in parts],
        "o-",
        color=RED,
        markersize=4,
        label="mean of a tenth of the pairs",
    )
    axes.axhline(0, color=DARK, linewidth=1)
    axes.axvline(0, color=DARK, linewidth=1)
    axes.legend(frameon=False)
    axes.set_xlabel("tokens by which the chosen answer is longer")
    axes.set_ylabel("reward margin")
    return _png(figure)


def reliability(bins: Sequence[Mapping[str, Any]]) -> str | None:
    """Accuracy against the probability that the policy gives its preference, and the pairs behind each point."""
    known = [part for part in bins if part["n"] and part["confidence"] is not None and part["accuracy"] is not None]
    if not known:
        return None
    figure, (axes, counts) = _figure(rows=2, height=3.6, height_ratios=(3, 1), sharex=True)
    axes.plot([0.5, 1], [0.5, 1], color=DARK, linewidth=1, linestyle="--", label="perfectly calibrated")
    confidence, accuracy = ([part[name] for part in known] for name in ("confidence", "accuracy"))
    axes.plot(confidence, accuracy, "o-", color=BLUE, markersize=5)
    axes.legend(frameon=False, loc="upper left")
    axes.set_ylabel("accuracy")
    axes.set_ylim(min(0.4, *accuracy) - 0.03, 1.03)
    for part in known:
        counts.bar(
            part["low"], part["n"], width=part["high"] - part["low"], align="edge", color=BLUE, edgecolor="white"
        )
    counts.set_ylabel("pairs")
    counts.set_xlim(0.49, 1.01)
    counts.set_xlabel("probability that the policy gives its preference")
    return _png(figure)


def training(history: Sequence[Mapping[str, float]]) -> str | None:
    """Loss and rewards by step."""
    if not history:
        return None
    figure, (axes, rewards) = _figure(rows=2, height=4.6, sharex=True)
    steps = [line["step"] + 1 for line in history]
    axes.plot(steps, [line["loss"] for line in history], color=BLUE, label="loss")
    measured = [line for line in history if "validation/loss" in line]
    if measured:
        at, losses = [line["step"] + 1 for line in measured], [line["validation/loss"] for line in measured]
        axes.plot(at, losses, "o", color=DARK, markersize=4, label="validation loss")
    axes.set_ylabel("loss")
    # Both sides, not their difference alone: a margin may also grow while both answers become unlikely.
    for side, color, style in (("margin", RED, "-"), ("chosen", GREEN, "--"), ("rejected", PURPLE, ":")):
        rewards.plot(steps, [line[f"rewards/{side}"] for line in history], style, color=color, label=side)
    rewards.set_ylabel("reward")
    rewards.set_xlabel("step")
    for part in (axes, rewards):
        part.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _png(figure)


def _figure(*, rows: int = 1, height: float = 2.9, **options: Any) -> tuple[Any, Any]:
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.figure import Figure

    # Small, so that the lettering can still be read on a phone's width.
    figure = Figure(figsize=(4.6, height), layout="constrained")
    grid = figure.subplots(
        rows, 1, squeeze=False, gridspec_kw={"height_ratios": options.pop("height_ratios", None)}, **options
    )
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0, 0] if rows == 1 else grid[:, 0]


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return base64.b64encode(buffer.getvalue()).decode()
