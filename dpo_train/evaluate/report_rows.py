"""Findings, as report.json has them, to the rows of the page's tables.

A row: what is measured (``label``, ``detail``), its ``estimate`` or else why there is none (``missing``), and the
``scale`` on which its interval is drawn (None: it is not drawn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
Row = dict[str, Any]

SHARE = {"low": 0.0, "high": 1.0, "at": 0.5}
"""Of accuracies and win rates: chance, or a draw, is in the middle."""
CORRELATION = {"low": -1.0, "high": 1.0, "at": 0.0}

_SLICES = (
    ("by_length", "By difference in length"),
    ("by_strength", "By strength of the preference"),
    ("by_origin", "By origin"),
)
_SAMPLED = (
    ("length", "Length", "tokens of an answer, its end token not counted"),
    ("length_ratio", "Length over the reference's", "at the same temperature; the line is 1"),
    ("repetition", "Repetition", "share of an answer's 4-grams that came before in it"),
    ("distinct_1", "Distinct-1", "different tokens over all of them"),
    ("distinct_2", "Distinct-2", "different pairs of tokens over all of them"),
    ("empty", "Empty", "share of answers without a visible character"),
    ("truncated", "Cut off", "share of answers that reached the longest length"),
)
_OPPONENTS = {"reference": "the reference", "chosen": "the data's chosen answers", "champion": "the champion"}


def of_set(part: Json) -> dict[str, Any]:
    """All tables of one set."""
    return {
        "label": part["name"],
        "detail": "in the training distribution" if part["is_trained_on"] else "outside the training distribution",
        "accuracy": part["accuracy"],
        "drop": part["drop"],
        "gain": part["champion"] and part["champion"]["difference"],
        "rows": _rewards(part) + _differences(part),
        "length_rows": _length_bias(part["length_bias"]),
        "bins": part["reliability"],
        "slices": [
            (title, [{"label": row["name"], "detail": "", **row} for row in part[key]]) for key, title in _SLICES
        ],
    }


def _rewards(part: Json) -> list[Row]:
    chosen, rejected, error = part["chosen_reward"], part["rejected_reward"], part["calibration_error"]
    scale = _scale(part["margin"], chosen, rejected, at=0.0)
    surer = "mean distance between the probability that the policy gives its preference and how often it is right"
    return [
        _row("accuracy", part["accuracy"], "share of pairs whose chosen answer is rewarded more; a tie is half", SHARE),
        _row("mean margin", part["margin"], "reward of the chosen answer minus that of the rejected one", scale),
        _row("reward of the chosen answers", chosen, "below zero: less likely than under the reference", scale),
        _row("reward of the rejected answers", rejected, "", scale),
        _row("calibration error (ECE)", error, surer, _scale(error)),
    ]


def _differences(part: Json) -> list[Row]:
    likelihood, champion = part["likelihood"], part["champion"]
    found = [
        (
            "policy - reference, by plain likelihood",
            likelihood["difference"],
            f"how much more often the chosen answer is the likelier one; {_paired(likelihood, 'the reference')}",
        )
    ]
    if champion:
        detail = f"difference in accuracy on the same pairs; {_paired(champion, 'the champion')}"
        found.append(("policy - champion", champion["difference"], detail))
    if part["drop"]:
        found.append(("drop", part["drop"], "accuracy minus that of the sets that were trained on"))
    scale = _scale(*(estimate for _, estimate, _ in found), at=0.0)
    return [_row(label, estimate, detail, scale) for label, estimate, detail in found]


def _length_bias(bias: Json) -> list[Row]:
    trend = "Spearman's, with the tokens by which the chosen answer is longer; the line is 0"
    unequal = "share of the pairs whose answers differ in length"
    return [
        _row("correlation of margin and length", bias["correlation"], trend, CORRELATION),
        _row("the policy prefers the longer answer", bias["prefers_longer"], unequal, SHARE),
        _row("the data prefers the longer answer", bias["data_prefers_longer"], "share of the same pairs", SHARE),
        _row("accuracy where the chosen answer is longer", bias["chosen_longer"], "", SHARE),
        _row("accuracy where the chosen answer is shorter", bias["chosen_shorter"], "", SHARE),
    ]


def of_divergence(divergence: Json | None) -> list[Row]:
    """KL(policy || reference); empty where it was not measured."""
    if divergence is None:
        return []
    error, per_token = number(divergence["standard_error"]), number(divergence["per_token"])
    detail = "nats per answer, from the policy's own answers at temperature 1"
    found = f"{detail}; standard error {error}; {per_token} nats per token"
    return [_row("KL(policy || reference)", divergence["kl"], found, _scale(divergence["kl"]))]


def of_samples(samples: Sequence[Json]) -> list[dict[str, Any]]:
    """A table per measure: its rows are the models at each temperature, on one scale."""
    tables = []
    for key, title, explained in _SAMPLED:
        found = [(sampled, _as_estimate(sampled[key], sampled)) for sampled in samples]
        # 1 is as long as the reference's; the other measures have no value to compare with.
        scale = _scale(*(estimate for _, estimate in found), at=1.0 if key == "length_ratio" else None)
        rows = [_row(f"{s['model']}, temperature {s['temperature']:g}", e, "", scale) for s, e in found if e]
        if rows:
            tables.append({"title": title, "explained": explained, "rows": rows})
    return tables


def of_comparison(comparison: Json) -> Row:
    """The win rate against one opponent; where no rule may rest on it, the reason stands in its place."""
    opponent, problem = comparison["opponent"], comparison["problem"]
    counts = [f"{comparison[what]:,} {what}" for what in ("wins", "ties", "losses", "unjudged")]
    lines = [", ".join(counts), f"{comparison['judge']}, temperature {comparison['temperature']:g}"]
    for key, what in (("first_wins", "takes the answer it sees first"), ("agreement", "says the same in both orders")):
        if found := comparison[key]:
            bounds = f"{number(found['low'])} to {number(found['high'])}"
            lines.append(f"{what}: {number(found['value'])} ({bounds}, n = {found['n']:,})")
    return _row(
        f"against {_OPPONENTS.get(opponent, f'{opponent} of the reference')}",
        None if problem else comparison["win_rate"],
        "\n".join(lines),
        SHARE,
        missing=f"No rule rests on this comparison: {problem}",
    )


def _row(
    label: str, estimate: Json | None, detail: str, scale: Json | None, missing: str = "not to be told from these pairs"
) -> Row:
    return {"label": label, "detail": detail, "estimate": estimate, "scale": scale, "missing": missing}


def _scale(*estimates: Json | None, at: float | None = None) -> Json:
    """From zero to a little beyond the largest bound; to both sides alike where the mark is zero."""
    ends = [abs(found[end]) for found in estimates if found for end in ("value", "low", "high") if found[end]]
    high = 1.1 * max([*ends, at or 0.0]) or 1.0
    return {"low": -high if at == 0 else 0.0, "high": high, "at": at}


def _as_estimate(found: Any, sampled: Json) -> Json | None:
    """distinct-n are plain numbers over all answers: they have no interval."""
    if isinstance(found, float):
        return {"value": found, "low": None, "high": None, "n": sampled["length"]["n"]}
    return found if found is None else dict(found)


def _paired(paired: Json, other: str) -> str:
    return (
        f"only the policy is right on {paired['better']:,} pairs, only {other} on {paired['worse']:,}; "
        f"p = {number(paired['p_value'])}"
    )


def number(value: float | None) -> str:
    """A number to read: three decimals, fewer of large ones, one digit of tiny ones. None is a dash."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
