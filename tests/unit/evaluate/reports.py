"""A report in which every field of the findings holds something."""

from __future__ import annotations

import dataclasses

import numpy as np

from dpo_train.evaluate.report import Report, Sample
from dpo_train.findings import (
    Bin,
    Champion,
    Comparison,
    Divergence,
    Estimate,
    Findings,
    LengthBias,
    Paired,
    RuleResult,
    SampleFindings,
    SetFindings,
    Slice,
    Verdict,
)

HOSTILE = (
    "</pre></style><script>document.title = 'ran'; alert('x')</script> \u202e "
    '<img src=http://evil.example/x onerror=1> & "quoted" {{ 1 + 1 }} \x00\x1b[31m \u200b\ufeff \ud800 שלום עולם '
    + "w"
    * 100_000
)


def estimate(value: float, half: float = 0.05, n: int = 300) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def slices(*names: str) -> tuple[Slice, ...]:
    return tuple(
        Slice(name=name, accuracy=estimate(0.55 + 0.05 * k, 0.09, 75), margin=estimate(0.1 + 0.05 * k, 0.06, 75))
        for k, name in enumerate(names)
    )


def set_findings(name: str, accuracy: float, *, trained: bool = True, drop: float | None = None) -> SetFindings:
    return SetFindings(
        name=name,
        is_trained_on=trained,
        accuracy=estimate(accuracy),
        margin=estimate(0.21),
        chosen_reward=estimate(-0.31),
        rejected_reward=estimate(-0.52),
        calibration_error=estimate(0.04, 0.02),
        reliability=tuple(
            Bin(
                low=0.5 + 0.1 * k,
                high=0.6 + 0.1 * k,
                confidence=0.55 + 0.1 * k,
                accuracy=0.54 + 0.08 * k,
                n=120 - 25 * k,
            )
            for k in range(5)
        ),
        by_origin=slices("forum", "chat $x^$ logs"),
        by_length=slices("chosen shorter by 12 or more", "within 12 tokens", "chosen longer by 12 or more"),
        by_strength=slices("weak: up to 1", "strong: above 1"),
        length_bias=LengthBias(
            correlation=estimate(0.12, 0.1),
            prefers_longer=estimate(0.56, 0.05, 280),
            data_prefers_longer=estimate(0.52, 0.05, 280),
            chosen_longer=estimate(0.68, 0.07, 146),
            chosen_shorter=None,
        ),
        likelihood=Paired(difference=estimate(0.08, 0.04), p_value=0.0004, better=31, worse=7),
        champion=Paired(difference=estimate(0.02, 0.03), p_value=0.21, better=22, worse=16),
        drop=None if drop is None else estimate(drop, 0.07),
    )


def sample_findings(model: str, temperature: float, length: float, ratio: float | None) -> SampleFindings:
    return SampleFindings(
        model=model,
        temperature=temperature,
        length=estimate(length, 9, 64),
        length_ratio=None if ratio is None else estimate(ratio, 0.1, 64),
        repetition=estimate(0.03, 0.01, 64),
        distinct_1=0.41,
        distinct_2=0.87,
        empty=Estimate(value=0.0, low=0.0, high=0.057, n=64),
        truncated=Estimate(value=0.125, low=0.065, high=0.228, n=64),
    )


def comparison(opponent: str, rate: float, problem: str | None = None) -> Comparison:
    return Comparison(
        opponent=opponent,
        judge="endpoint small-judge",
        temperature=1.0,
        wins=36,
        ties=8,
        losses=18,
        unjudged=2,
        win_rate=estimate(rate, 0.11, 62),
        first_wins=estimate(0.54, 0.06, 120),
        agreement=estimate(0.81, 0.1, 62),
        problem=problem,
    )


def findings() -> Findings:
    return Findings(
        beta=0.1,
        heldout=set_findings("held-out pairs", 0.64),
        sets=(
            set_findings("helpful", 0.66),
            set_findings("forum/en", 0.62),
            set_findings("summaries", 0.55, trained=False, drop=-0.09),
        ),
        divergence=Divergence(kl=estimate(3.2, 0.4, 64), standard_error=0.2, per_token=0.041),
        samples=(
            sample_findings("reference", 1.0, 81, None),
            sample_findings("policy", 1.0, 96, 1.19),
            sample_findings("champion", 1.0, 88, 1.09),
            sample_findings("policy", 0.7, 90, 1.11),
        ),
        comparisons=(
            comparison("reference", 0.645),
            comparison("chosen", 0.41),
            comparison("best of 4", 0.5, "the judge takes the first answer in 97 % of the cases"),
            comparison("champion", 0.55),
        ),
        champion=Champion(name="dpo-policy", version="3", digest="9f2c44aa01b7"),
        notes=("The endpoint reports no token counts: costs are not known.",),
    )


def verdict(outcome: str = "failed") -> Verdict:
    return Verdict(
        learned=True,
        passed=outcome == "passed",
        rules=(
            RuleResult(rule="accuracy", outcome="passed", limit="above 0.5", found=estimate(0.64)),
            RuleResult(
                rule="KL(policy || reference)",
                outcome=outcome,  # type: ignore[arg-type]
                limit="below 2.5",
                found=estimate(3.2, 0.4, 64),
                reason="the whole interval lies above the limit",
            ),
            RuleResult(
                rule="win rate against the champion",
                outcome="not_applied",
                limit="above 0.5",
                reason="there is no champion",
            ),
        ),
    )


def report(**changes: object) -> Report:
    generator = np.random.default_rng(0)
    differences_P = generator.normal(0, 20, 300).round()
    whole = Report(
        findings=findings(),
        verdict=verdict(),
        samples=[
            Sample(
                prompt="user: How do I keep basil alive on a windowsill?",
                answers={
                    "chosen (data)": "Six hours of sun, and water when the top of the soil is dry.",
                    "reference": "Basil is a plant. " * 12,
                    "policy": "Give it a bright sill, water it from below, and pinch off the tips every week.",
                    "champion": "Water it.\n\nTurn the pot now and then.",
                },
                notes={"policy": "won against reference; 19 tokens", "reference": "cut off; 64 tokens"},
            ),
            Sample(prompt=HOSTILE, answers={"reference": HOSTILE, "policy": "fine"}),
        ],
        margins_P=generator.normal(0.2, 0.5, 300) + 0.004 * differences_P,
        length_differences_P=differences_P,
        history=[
            {
                "step": k,
                "loss": 0.69 - 0.004 * k,
                "rewards/margin": 0.01 * k,
                "rewards/chosen": -0.01 * k,
                "rewards/rejected": -0.02 * k,
                **({"validation/loss": 0.69 - 0.003 * k} if k % 10 == 9 else {}),
            }
            for k in range(40)
        ],
        identity={"policy": "abc" * 20, "scored": "def" * 20},
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]
