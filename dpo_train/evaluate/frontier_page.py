"""The frontier's page: one file that loads nothing. Names are shown as text, whatever they hold.

A setting is a mark and a curve; its trials, one per seed, are rows. What points at one of them lights up the others.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_train.config import SelectConfig
from dpo_train.data.report_page import visible
from dpo_train.evaluate.frontier_picture import KL, Curve, Mark, Picture, Way, limits
from dpo_train.evaluate.frontier_template import PAGE, SCRIPT, STYLE
from dpo_train.evaluate.report_rows import number
from dpo_train.evaluate.trials import Choice, Trial, setting_name, shown
from dpo_train.findings import Estimate

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 300, 48, 372, 10, 252
"""Of a chart, in units of its lettering: on a phone one is about a pixel."""
MOST_NAME_CHARS = 200

SHAPES = {
    "o": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
    "s": "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "^": "M0 -5.5L5.3 4.5H-5.3Z",
    "D": "M0 -6L6 0L0 6L-6 0Z",
    "v": "M0 5.5L5.3 -4.5H-5.3Z",
}
"""Paths around (0, 0), by matplotlib's names."""

_COLUMNS = {
    "accuracy": "accuracy",
    "reward": "reward",
    "win_rate": "win rate",
    "kl": "KL (nats/answer)",
    "length_ratio": "length / reference's",
    "margin": "margin",
}
_STATES = ("finished", "stopped", "failed")


class _Scale:
    """Numbers to places of an axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        """What lies outside is at the end."""
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return round(self._start + share * (self._end - self._start), 2)

    def ticks(self) -> list[dict[str, Any]]:
        """Some five round numbers: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [{"at": self(each * step), "text": f"{each * step:,.{places}f}"} for each in numbers]


def to_html(trials: Sequence[Trial], choice: Choice | None, config: SelectConfig, drawn: Picture) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize)
    environment.filters |= {"number": number, "name": _name, "spaced": _spaced}
    settings = _settings(trials, choice, drawn)
    tags = {setting["name"]: {"key": setting["key"], "filters": setting["filters"]} for setting in settings}
    shapes = [(words, None, SHAPES[shape]) for words, shape in drawn.shapes]
    metric = _COLUMNS[config.metric]
    filled = {
        "style": Markup(STYLE),  # noqa: S704 - our own text
        "script": Markup(SCRIPT),  # noqa: S704 - our own text
        "style_digest": _digest(STYLE),
        "script_digest": _digest(SCRIPT),
        "headline": "nothing was chosen" if choice is None else f"{_name(setting_name(choice.trial))} chosen",
        "chosen": choice is not None,
        "verdict": "No trial could be chosen." if choice is None else _verdict(choice.trial, config),
        "rule": f"The rule: {_rule(config, metric)}.",
        "notes": () if choice is None else choice.notes,
        "filters": _filters(trials),
        "chart": _chart(drawn, tags),
        "steps": _steps(drawn, tags),
        "legend": [*((words, colour, SHAPES["o"]) for words, colour in drawn.colours), *shapes],
        "any_stopped": any(way.is_stopped for way in drawn.ways),
        "any_over": any(not mark.is_within for mark in drawn.marks),
        "settings": settings,
        "columns": [_COLUMNS[name] for name in _measured(trials, config)],
        "rows": [_row(trial, choice, config, trials, tags) for trial in _ordered(trials, choice, config)],
    }
    return environment.from_string(PAGE).render(filled)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _verdict(trial: Trial, config: SelectConfig) -> str:
    found = [f"{_COLUMNS[name]} {_interval(getattr(trial, name))}" for name in _measured([trial], config)[:3]]
    return f"{_name(trial.name)}: {', '.join(found)}"


def _rule(config: SelectConfig, metric: str) -> str:
    budgets = []
    if config.max_kl is not None:
        budgets.append(f"a KL of at most {config.max_kl:g}")
    if config.max_length_growth is not None:
        budgets.append(f"a growth in length of at most {config.max_length_growth:g}")
    among = f", among those with {' and '.join(budgets)}" if budgets else ""
    return f"the simplest setting within one standard error of the best {metric}{among}; ties go to the larger beta"


def _interval(found: Estimate) -> str:
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def _measured(trials: Sequence[Trial], config: SelectConfig) -> list[str]:
    """Names of the numbers that there are, what selects first."""
    names = sorted(_COLUMNS, key=lambda name: name != config.metric)
    return [name for name in names if any(getattr(trial, name) is not None for trial in trials)]


def _state(trial: Trial) -> str:
    return "failed" if trial.failure is not None else "stopped" if trial.stopped is not None else "finished"


def _filters(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What can be filtered by: each parameter with its values, and how a trial ended."""
    keys = dict.fromkeys(key for trial in trials for key in trial.parameters)
    found = [
        {"name": key, "values": list(dict.fromkeys(shown(trial.parameters.get(key, "")) for trial in trials))}
        for key in keys
    ]
    ended = [state for state in _STATES if state in {_state(trial) for trial in trials}]
    return [*found, {"name": "ended", "values": ended}]


def _settings(trials: Sequence[Trial], choice: Choice | None, drawn: Picture) -> list[dict[str, Any]]:
    """Every setting with what ties its parts together: a key, and by filter the number of its value."""
    filters = _filters(trials)
    members: dict[str, list[Trial]] = {}
    for trial in trials:
        members.setdefault(setting_name(trial), []).append(trial)
    marks = {mark.name: mark for mark in drawn.marks}
    ways = {way.name: _by_step(way, drawn) for way in drawn.ways}
    found = []
    for place, (name, several) in enumerate(members.items()):
        state = min((_state(trial) for trial in several), key=_STATES.index)
        values = [shown(several[0].parameters.get(each["name"], "")) for each in filters[:-1]]
        places = [each["values"].index(value) for each, value in zip(filters, [*values, state], strict=True)]
        mark = marks.get(name)
        numbers = [] if mark is None else [(drawn.y_label, _interval(mark.y)), (drawn.x_label, _interval(mark.x))]
        numbers += ways.get(name, [])
        is_chosen = choice is not None and choice.trial in several
        why = "chosen" if is_chosen or choice is None else choice.why_not[several[0].name]
        found.append(
            {
                "key": f"s{place}",
                "filters": places,
                "name": name,
                "is_chosen": is_chosen,
                "state": state if len(several) == 1 else f"{state}, {len(several)} seeds",
                "numbers": [*numbers, ("", why)] if choice is not None else numbers,
            }
        )
    return found


def _chart(drawn: Picture, tags: Mapping[str, Any]) -> dict[str, Any]:
    x = _Scale(*limits(drawn.all_x, *([0.0] if drawn.x_label == KL else [])), LEFT, RIGHT)
    y = _Scale(*limits(drawn.all_y), BOTTOM, TOP)
    frontier = [mark for mark in drawn.marks if mark.is_frontier]
    band = [(m.x.value, m.y.high) for m in frontier] + [(m.x.value, m.y.low) for m in reversed(frontier)]
    # The chosen one last, on top of the others.
    marks = sorted(drawn.marks, key=lambda mark: mark.is_chosen)
    return {
        **_frame(x, y, drawn.x_label),
        "y_label": drawn.y_label,
        "line": _polyline(((m.x.value, m.y.value) for m in frontier), x, y),
        "band": _polyline(band, x, y) if any(mark.seeds for mark in frontier) else "",
        "budget": None if drawn.budget is None or not x.low < drawn.budget < x.high else x(drawn.budget),
        "marks": [{**tags[mark.name], **_mark(mark, drawn, x, y)} for mark in marks],
        "ways": [{**tags[way.name], **_way(way, drawn, x, y)} for way in drawn.ways],
    }


def _way(way: Way, drawn: Picture, x: _Scale, y: _Scale) -> dict[str, Any]:
    points = [(kl.value, found.value) for kl, found in zip(way.kl, way.metric, strict=True)]
    band = [(at, found.high) for (at, _), found in zip(points, way.metric, strict=True)]
    band += [(at, found.low) for (at, _), found in reversed(list(zip(points, way.metric, strict=True)))]
    words = f"{_name(way.name)}, {'; '.join(f'{step}: {text}' for step, text in _by_step(way, drawn))}"
    return {
        "words": words + ("; stopped" if way.is_stopped else ""),
        "colour": drawn.looks[way.name].colour,
        "line": _polyline(points, x, y),
        "dots": [(x(at), y(value)) for at, value in points],
        "band": _polyline(band, x, y) if way.has_seeds and len(points) > 1 else "",
        "is_stopped": way.is_stopped,
    }


def _by_step(way: Way, drawn: Picture) -> list[tuple[str, str]]:
    """What was found of a setting on its way: ("step 20", ...)."""
    return [
        (f"step {step}", f"{drawn.y_label} {number(found.value)}, KL {number(kl.value)}")
        for step, kl, found in zip(way.steps, way.kl, way.metric, strict=True)
    ]


def _mark(mark: Mark, drawn: Picture, x: _Scale, y: _Scale) -> dict[str, Any]:
    words = f"{_name(mark.name)}: {drawn.y_label} {_interval(mark.y)}, {drawn.x_label} {_interval(mark.x)}"
    return {
        "words": words + ("; chosen" if mark.is_chosen else ""),
        "colour": drawn.looks[mark.name].colour,
        "shape": SHAPES[drawn.looks[mark.name].shape],
        "is_within": mark.is_within,
        "is_chosen": mark.is_chosen,
        "x": x(mark.x.value),
        "x_low": x(mark.x.low),
        "x_high": x(mark.x.high),
        "y": y(mark.y.value),
        "y_low": y(mark.y.low),
        "y_high": y(mark.y.high),
        "seeds": [(x(at), y(value)) for at, value in mark.seeds],
    }


def _steps(drawn: Picture, tags: Mapping[str, Any]) -> dict[str, Any]:
    last = max((step for curve in drawn.curves for step in curve.steps), default=1)
    x = _Scale(0, 1.04 * last, LEFT, RIGHT)
    y = _Scale(*limits(estimate for curve in drawn.curves for estimate in curve.accuracy), BOTTOM, TOP)
    chosen = {mark.name for mark in drawn.marks if mark.is_chosen}
    curves = [{**tags[c.name], **_curve(c, drawn, x, y), "is_chosen": c.name in chosen} for c in drawn.curves]
    return {**_frame(x, y, "step"), "curves": curves}


def _curve(curve: Curve, drawn: Picture, x: _Scale, y: _Scale) -> dict[str, Any]:
    points = [(step, found.value) for step, found in zip(curve.steps, curve.accuracy, strict=True)]
    high = [(step, found.high) for step, found in zip(curve.steps, curve.accuracy, strict=True)]
    low = [(step, found.low) for step, found in zip(curve.steps, curve.accuracy, strict=True)]
    return {
        "words": _name(curve.name),
        "colour": drawn.looks[curve.name].colour,
        "shape": SHAPES[drawn.looks[curve.name].shape],
        "line": _polyline(points, x, y),
        "dots": [(x(step), y(value)) for step, value in points],
        "band": _polyline([*high, *reversed(low)], x, y) if curve.has_seeds else "",
    }


def _frame(x: _Scale, y: _Scale, x_label: str) -> dict[str, Any]:
    places = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return {**places, "x_ticks": x.ticks(), "y_ticks": y.ticks(), "x_label": x_label}


def _polyline(points: Iterable[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(at)},{y(value)}" for at, value in points)


def _ordered(trials: Sequence[Trial], choice: Choice | None, config: SelectConfig) -> list[Trial]:
    """The chosen one, then the best first, then those that have no number."""

    def key(trial: Trial) -> tuple[Any, ...]:
        found: Estimate | None = getattr(trial, config.metric)
        value = -math.inf if found is None else found.value
        return choice is None or trial is not choice.trial, _STATES.index(_state(trial)), -value, trial.name

    return sorted(trials, key=key)


def _row(
    trial: Trial, choice: Choice | None, config: SelectConfig, trials: Sequence[Trial], tags: Mapping[str, Any]
) -> dict[str, Any]:
    is_chosen = choice is not None and trial.name == choice.trial.name
    state = _state(trial)
    reason = "" if choice is None or is_chosen else choice.why_not[trial.name]
    return {
        **tags[setting_name(trial)],
        "name": trial.name,
        "cells": [(_COLUMNS[name], getattr(trial, name)) for name in _measured(trials, config)],
        "steps": trial.steps,
        "is_lit": choice is not None and setting_name(trial) == setting_name(choice.trial),
        "kind": "passed" if is_chosen else {"finished": "not_applied", "stopped": "undecided"}.get(state, "failed"),
        "badge": "chosen" if is_chosen else state,
        "why": trial.failure or trial.stopped or reason,
    }


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _spaced(text: str) -> str:
    """With room to break a line between the parameters of a name."""
    return re.sub(r",(?=[a-z_.]+=)", ", ", text)


def _name(text: str) -> str:
    text = _spaced(text)
    return text if len(text) <= MOST_NAME_CHARS else f"{text[:MOST_NAME_CHARS]}\N{HORIZONTAL ELLIPSIS}"
