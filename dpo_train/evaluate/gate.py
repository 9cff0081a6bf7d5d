"""The gate: findings and rules to a verdict. Pure.

A rule holds of the whole 95 % interval. It is passed if the interval lies on the right side of the limit, failed if it
lies on the wrong side, and undecided if it reaches over the limit or if what it asks for was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from dpo_train.config import GateConfig
from dpo_train.findings import Comparison, Estimate, Findings, Outcome, RuleResult, SetFindings, Verdict

Side = Literal["above", "below", "at least"]

_MANY = 10_000_000  # a value this close to the limit, measured in n, counts as being at the limit


def judge(findings: Findings, config: GateConfig) -> Verdict:
    """Applies every rule that is configured. Only rules that are passed or do not apply let a model pass.

    ``learned`` is the bar below which the training itself has failed, whatever the rules say: chance.
    """
    heldout = findings.heldout
    rules = (
        _rule("accuracy", heldout.accuracy, "above", config.min_accuracy, "pairs"),
        _rule("reward margin", heldout.margin, "above", config.min_margin, "pairs"),
        *_sample_rules(findings, config),
        *_win_rate_rules(findings, config),
        *_set_rules(findings, config),
        *_safety_rules(findings, config),
    )
    learned = heldout.accuracy.low > 0.5 and heldout.margin.value > 0
    passed = learned and all(rule.outcome in ("passed", "not_applied") for rule in rules)
    return Verdict(learned=learned, passed=passed, rules=rules)


def _sample_rules(findings: Findings, config: GateConfig) -> Iterator[RuleResult]:
    if config.max_kl is not None:
        found = findings.divergence.kl if findings.divergence else None
        missing = _unsampled(findings) or "KL was not measured: it takes answers at temperature 1"
        rule = _rule("KL to the reference", found, "below", config.max_kl, "answers", missing=missing)
        yield replace(rule, limit=f"{rule.limit} nats per answer")
    if config.max_length_growth is not None:
        policy = next((sample for sample in findings.samples if sample.model == "policy"), None)
        found = policy.length_ratio if policy else None
        missing = _unsampled(findings) or "there are no answers of the reference to compare lengths with"
        rule = _rule("length growth", found, "below", config.max_length_growth, "prompts", missing=missing)
        yield replace(rule, limit=f"{rule.limit} x the reference's mean length")


def _win_rate_rules(findings: Findings, config: GateConfig) -> Iterator[RuleResult]:
    limits = {"reference": config.min_win_rate, "champion": config.min_win_rate_champion}
    for opponent, limit in limits.items():
        if limit is None:
            continue
        name = f"win rate against the {opponent}"
        if opponent == "champion" and findings.champion is None:
            yield _without_champion(name, "above", limit)
            continue
        comparison = _comparison(findings, opponent)
        missing = _unsampled(findings) or "no judge has compared the answers (evaluate.judge)"
        found = comparison.win_rate if comparison else None
        rule = _rule(name, found, "above", limit, "prompts", missing=missing)
        if comparison and comparison.problem:
            rule = replace(rule, outcome="undecided", reason=comparison.problem)
        yield rule


def _set_rules(findings: Findings, config: GateConfig) -> Iterator[RuleResult]:
    if config.max_set_loss is None:
        return
    if findings.champion is None:
        yield _without_champion("accuracy against the champion", "at least", -config.max_set_loss)
        return
    for name, part in _sets(findings).items():
        yield _rule(
            f"accuracy against the champion: {name}",
            part.champion.difference if part.champion else None,
            "at least",
            -config.max_set_loss,
            "pairs",
            missing="the champion was not scored on these pairs",
        )


def _safety_rules(findings: Findings, config: GateConfig) -> Iterator[RuleResult]:
    sets = _sets(findings)
    for name in config.safety_sets:
        yield _rule(
            f"safety set untouched: {name}",
            sets[name].likelihood.difference if name in sets else None,
            "at least",
            -config.max_safety_loss,
            "pairs",
            missing=f"there is no held-out set of this name, but {', '.join(sets)} (evaluate.gate.safety_sets)",
        )


def _sets(findings: Findings) -> dict[str, SetFindings]:
    return {part.name: part for part in findings.sets or (findings.heldout,)}


def _comparison(findings: Findings, opponent: str) -> Comparison | None:
    """The first one, which is at the first temperature."""
    return next((comparison for comparison in findings.comparisons if comparison.opponent == opponent), None)


def _unsampled(findings: Findings) -> str | None:
    return None if findings.samples else "no answers were sampled (evaluate.num_prompts)"


def _without_champion(name: str, side: Side, limit: float) -> RuleResult:
    return RuleResult(rule=name, outcome="not_applied", limit=f"{side} {limit:g}", reason="there is no champion")


def _rule(
    name: str, found: Estimate | None, side: Side, limit: float, unit: str, *, missing: str = "not measured"
) -> RuleResult:
    """``unit``: what ``found.n`` counts. ``missing``: why ``found`` is None."""
    outcome: Outcome = "undecided"
    reason = missing
    if found is not None:
        outcome, reason = _decide(found, side, limit, unit)
    return RuleResult(rule=name, outcome=outcome, limit=f"{side} {limit:g}", found=found, reason=reason)


def _decide(found: Estimate, side: Side, limit: float, unit: str) -> tuple[Outcome, str]:
    if not math.isfinite(found.value) or math.isnan(found.low) or math.isnan(found.high):
        return "failed", "it is not a finite number"
    if side == "below":
        passed, failed = found.high < limit, found.low >= limit
    elif side == "above":
        passed, failed = found.low > limit, found.high <= limit
    else:
        passed, failed = found.low >= limit, found.high < limit
    if passed:
        return "passed", ""
    if failed:
        return "failed", "the whole interval lies on the wrong side of the limit"
    return "undecided", _why_undecided(found, limit, unit)


def _why_undecided(found: Estimate, limit: float, unit: str) -> str:
    """An interval shrinks with 1 / sqrt(n): how large n would have to be for this one to end at the limit."""
    what = f"the interval from {found.n:,} {unit} reaches over the limit"
    gap = abs(found.value - limit)
    half = found.value - found.low if found.value > limit else found.high - found.value
    needed = found.n * (half / gap) ** 2 if gap else math.inf
    if needed > _MANY:
        return f"{what}, and the value is at it: more of them would hardly decide"
    digits = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    rounded = max(round(needed / digits) * digits, found.n + 1)
    return f"{what}; about {rounded:,} would decide it if the value stayed at {found.value:.4g}"
