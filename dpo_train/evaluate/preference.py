"""Held-out preferences: does the implicit reward prefer the chosen answers, of which pairs, and how sure is it of them?

reward = beta * log(policy / reference), margin = chosen reward - rejected reward (arXiv 2305.18290, section 4).

P: pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dpo_train.errors import RunError
from dpo_train.evaluate import slices
from dpo_train.evaluate.calibration import calibrate
from dpo_train.evaluate.statistics import Floats, Means, difference, number_groups, paired, spearman
from dpo_train.findings import Estimate, LengthBias, Paired, SetFindings, Slice

ALL_HELDOUT = "held-out"
"""Name of the pairs of several sets together."""


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Held-out pairs and what the models say about them."""

    groups: Sequence[str]
    """For each pair the group it belongs to; pairs of one group are not independent."""
    sets: Sequence[str]
    """Name of the source."""
    origins: Sequence[str]
    """Where the data itself says that the record is from; "": it does not say."""
    strengths_P: Floats
    """How much better the chosen answer is, in the data's own units; NaN: unknown."""
    chosen_lengths_P: Floats
    rejected_lengths_P: Floats
    """Tokens of the answers."""
    policy: tuple[Floats, Floats]
    reference: tuple[Floats, Floats]
    champion: tuple[Floats, Floats] | None = None
    """Summed log-probs [P] of the chosen and of the rejected answers, nats."""
    trained_on: frozenset[str]
    """Names of the sets from which training pairs come."""

    def select(self, is_in_P: npt.NDArray[np.bool_]) -> Heldout:
        """Some of the pairs."""

        def names(values: Sequence[str]) -> list[str]:
            return [value for value, is_in in zip(values, is_in_P, strict=True) if is_in]

        def scores(values: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
            return values[0][is_in_P], values[1][is_in_P]

        return replace(
            self,
            groups=names(self.groups),
            sets=names(self.sets),
            origins=names(self.origins),
            strengths_P=self.strengths_P[is_in_P],
            chosen_lengths_P=self.chosen_lengths_P[is_in_P],
            rejected_lengths_P=self.rejected_lengths_P[is_in_P],
            policy=scores(self.policy),
            reference=scores(self.reference),
            champion=None if self.champion is None else scores(self.champion),
        )


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """What was found, and the margins [P] of all pairs that it came from."""

    heldout: SetFindings
    sets: tuple[SetFindings, ...]
    margins_P: Floats


def measure(heldout: Heldout, *, beta: float, seed: int) -> Preferences:
    """Findings over the pairs of all sets that are trained on (of all sets where none is), and over each set by itself
    where there are several.

    Args:
        beta: of the training.
        seed: of the resampling.

    Raises:
        RunError: a log-prob is not finite.
    """
    _check_finite(heldout)
    names = sorted(set(heldout.sets), key=lambda name: (name not in heldout.trained_on, name))
    trained = [name for name in names if name in heldout.trained_on]
    together = _measure_sets(heldout, trained or names, beta=beta, seed=seed)
    sets = []
    for name in names if len(names) > 1 else []:
        found = together if trained == [name] else _measure_sets(heldout, [name], beta=beta, seed=seed)
        if trained and not found.is_trained_on:
            found = replace(found, drop=difference(found.accuracy, together.accuracy))
        sets.append(found)
    chosen_P, rejected_P = _rewards(heldout.policy, heldout.reference, beta)
    return Preferences(heldout=together, sets=tuple(sets), margins_P=chosen_P - rejected_P)


def _measure_sets(heldout: Heldout, names: Sequence[str], *, beta: float, seed: int) -> SetFindings:
    pairs = heldout.select(np.isin(np.array(heldout.sets, dtype=object).astype(str), names))
    chosen_P, rejected_P = _rewards(pairs.policy, pairs.reference, beta)
    margins_P, right_P = chosen_P - rejected_P, _right(chosen_P, rejected_P)
    lengths_P = pairs.chosen_lengths_P - pairs.rejected_lengths_P
    group_P = number_groups(pairs.groups)
    parts = {
        "origin": slices.by_origin(pairs.origins),
        "length": slices.by_length(lengths_P),
        "strength": slices.by_strength(pairs.strengths_P),
    }
    calibration = calibrate(margins_P, right_P)
    columns = {"right": right_P, "margin": margins_P, "chosen": chosen_P, "rejected": rejected_P}
    columns |= calibration.gaps | _length_columns(right_P, lengths_P) | _slice_columns(parts, right_P, margins_P)
    differences = _differences(pairs, right_P)
    means = Means(columns | differences, group_P, seed=seed)
    against = {who: paired(difference_P, group_P, means.mean(who)) for who, difference_P in differences.items()}
    return SetFindings(
        name=names[0] if len(names) == 1 else ALL_HELDOUT,
        is_trained_on=not heldout.trained_on.isdisjoint(names),
        accuracy=means.share("right"),
        margin=means.mean("margin"),
        chosen_reward=means.mean("chosen"),
        rejected_reward=means.mean("rejected"),
        calibration_error=calibration.error(means, group_P),
        reliability=calibration.bins,
        by_origin=_slices(means, "origin", parts),
        by_length=_slices(means, "length", parts),
        by_strength=_slices(means, "strength", parts),
        length_bias=_length_bias(means, spearman(margins_P, lengths_P, group_P, seed=seed)),
        likelihood=_exact_if_same(against["reference"], pairs.policy, pairs.reference),
        champion=None if pairs.champion is None else _exact_if_same(against["champion"], pairs.policy, pairs.champion),
    )


def _rewards(model: tuple[Floats, Floats], reference: tuple[Floats, Floats], beta: float) -> tuple[Floats, Floats]:
    return beta * (model[0] - reference[0]), beta * (model[1] - reference[1])


def _right(chosen_P: Floats, rejected_P: Floats) -> Floats:
    """1 where the chosen answer has more of something, 0.5 where both have as much."""
    right_P: Floats = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
    return right_P


def _slice_columns(parts: Mapping[str, slices.Parts], right_P: Floats, margins_P: Floats) -> dict[str, Floats]:
    columns = {}
    for kind, named in parts.items():
        for name, inside_P in named:
            columns[f"right of {kind} {name}"] = np.where(inside_P, right_P, np.nan)
            columns[f"margin of {kind} {name}"] = np.where(inside_P, margins_P, np.nan)
    return columns


def _slices(means: Means, kind: str, parts: Mapping[str, slices.Parts]) -> tuple[Slice, ...]:
    return tuple(
        Slice(name=name, accuracy=means.share(f"right of {kind} {name}"), margin=means.mean(f"margin of {kind} {name}"))
        for name, _ in parts[kind]
    )


def _length_columns(right_P: Floats, lengths_P: Floats) -> dict[str, Floats]:
    is_longer_P, is_equal_P = lengths_P > 0, lengths_P == 0
    return {
        "prefers longer": np.where(is_equal_P, np.nan, np.where(is_longer_P, right_P, 1 - right_P)),
        "data prefers longer": np.where(is_equal_P, np.nan, is_longer_P.astype(np.float64)),
        "chosen longer": np.where(is_longer_P, right_P, np.nan),
        "chosen shorter": np.where(is_longer_P | is_equal_P, np.nan, right_P),
    }


def _length_bias(means: Means, correlation: Estimate | None) -> LengthBias:
    def share(name: str) -> Estimate | None:
        return means.share(name) if means.n(name) else None

    return LengthBias(
        correlation=correlation,
        prefers_longer=share("prefers longer"),
        data_prefers_longer=share("data prefers longer"),
        chosen_longer=share("chosen longer"),
        chosen_shorter=share("chosen shorter"),
    )


def _differences(pairs: Heldout, right_P: Floats) -> dict[str, Floats]:
    """By whom the policy is compared with: by plain log-probs with the reference, by rewards with the champion."""
    columns = {"reference": _right(*pairs.policy) - _right(*pairs.reference)}
    if pairs.champion is not None:
        columns["champion"] = right_P - _right(*_rewards(pairs.champion, pairs.reference, 1.0))
    return columns


def _exact_if_same(found: Paired, first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> Paired:
    """The same log-probs to the bit come from the same model: it will not differ on other pairs either."""
    if all(np.array_equal(one, other) for one, other in zip(first, second, strict=True)):
        return replace(found, difference=replace(found.difference, low=0.0, high=0.0))
    return found


def _check_finite(heldout: Heldout) -> None:
    for who, scores in (("policy", heldout.policy), ("reference", heldout.reference), ("champion", heldout.champion)):
        if scores is None or np.isfinite(scores).all():
            continue
        wrong = np.flatnonzero(~np.isfinite(scores[0] + scores[1]))
        raise RunError(
            f"Log-probs of the {who} are not finite",
            got=f"{len(wrong)} of {len(scores[0])} held-out pairs, the first being number {wrong[0]}",
            expected="finite numbers",
            fix="look for NaN and infinite values in the weights",
        )
