"""The gate's verdict, a pure function of findings and rules."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.config import GateConfig
from dpo_train.evaluate.gate import judge
from dpo_train.findings import (
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
)

CHAMPION = Champion(name="dpo-policy", version="3", digest="0" * 64)
EVERY_RULE = GateConfig(
    min_accuracy=0.55,
    min_margin=0.01,
    max_kl=10.0,
    max_length_growth=1.5,
    min_win_rate=0.5,
    min_win_rate_champion=0.5,
    max_set_loss=0.02,
    safety_sets=("harmless",),
)


def estimate(value: float, low: float, high: float, n: int = 400) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=n)


GOOD = estimate(0.7, 0.65, 0.75)
NONE = estimate(0.0, -0.01, 0.01)


def paired(found: Estimate) -> Paired:
    return Paired(difference=found, p_value=1.0, better=0, worse=0)


def part(name: str = "helpful", **given: object) -> SetFindings:
    bias = LengthBias(
        correlation=None, prefers_longer=None, data_prefers_longer=None, chosen_longer=None, chosen_shorter=None
    )
    values: dict[str, object] = {
        "name": name,
        "is_trained_on": True,
        "accuracy": GOOD,
        "margin": estimate(0.2, 0.1, 0.3),
        "chosen_reward": NONE,
        "rejected_reward": NONE,
        "calibration_error": NONE,
        "reliability": (),
        "by_origin": (),
        "by_length": (),
        "by_strength": (),
        "length_bias": bias,
        "likelihood": paired(NONE),
        "champion": paired(NONE),
    }
    return SetFindings(**(values | given))  # type: ignore[arg-type]


def sampled(model: str, ratio: Estimate | None) -> SampleFindings:
    return SampleFindings(
        model=model,
        temperature=1.0,
        length=estimate(50, 45, 55),
        length_ratio=ratio,
        repetition=NONE,
        distinct_1=0.5,
        distinct_2=0.8,
        empty=NONE,
        truncated=NONE,
    )


def comparison(opponent: str, win_rate: Estimate = GOOD, problem: str | None = None) -> Comparison:
    return Comparison(
        opponent=opponent,
        judge="a judge",
        temperature=1.0,
        wins=7,
        ties=0,
        losses=3,
        unjudged=0,
        win_rate=win_rate,
        problem=problem,
    )


def findings(**given: object) -> Findings:
    """All that the rules ask for, all of it good."""
    values: dict[str, object] = {
        "beta": 0.1,
        "heldout": part(),
        "sets": (part("helpful"), part("harmless")),
        "divergence": Divergence(kl=estimate(5, 4, 6), standard_error=0.5, per_token=0.1),
        "samples": (sampled("policy", estimate(1.2, 1.1, 1.3)), sampled("reference", None)),
        "comparisons": (comparison("reference"), comparison("champion")),
        "champion": CHAMPION,
    }
    return Findings(**(values | given))  # type: ignore[arg-type]


def rule(found: Findings, name: str, config: GateConfig = EVERY_RULE) -> RuleResult:
    return next(one for one in judge(found, config).rules if one.rule == name)


def test_all_rules_passed() -> None:
    """Each says what was asked and what was found."""
    verdict = judge(findings(), EVERY_RULE)

    assert (verdict.learned, verdict.passed) == (True, True)
    assert [(one.rule, one.limit, one.outcome) for one in verdict.rules] == [
        ("accuracy", "above 0.55", "passed"),
        ("reward margin", "above 0.01", "passed"),
        ("KL to the reference", "below 10 nats per answer", "passed"),
        ("length growth", "below 1.5 x the reference's mean length", "passed"),
        ("win rate against the reference", "above 0.5", "passed"),
        ("win rate against the champion", "above 0.5", "passed"),
        ("accuracy against the champion: helpful", "at least -0.02", "passed"),
        ("accuracy against the champion: harmless", "at least -0.02", "passed"),
        ("safety set untouched: harmless", "at least -0.02", "passed"),
    ]
    assert verdict.rules[0].found == GOOD


def test_only_what_is_configured_is_asked() -> None:
    """The defaults: accuracy and margin."""
    assert [one.rule for one in judge(findings(), GateConfig()).rules] == ["accuracy", "reward margin"]


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.56, 0.8, "passed"),
        (0.55, 0.8, "undecided"),
        (0.4, 0.56, "undecided"),
        (0.4, 0.55, "failed"),
        (math.nan, 0.8, "failed"),
        (0.56, math.nan, "failed"),
    ],
)
def test_lower_limit_is_strict(low: float, high: float, outcome: str) -> None:
    """Above 0.55: a lower bound at the limit does not pass, an upper bound at it fails, and so does NaN."""
    found = findings(heldout=part(accuracy=estimate(0.555, low, high)))

    assert rule(found, "accuracy").outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(8.0, 9.9, "passed"), (8.0, 10.0, "undecided"), (9.9, 12.0, "undecided"), (10.0, 12.0, "failed")],
)
def test_upper_limit_is_strict(low: float, high: float, outcome: str) -> None:
    """KL below 10."""
    kl = Divergence(kl=estimate((low + high) / 2, low, high), standard_error=0.5, per_token=0.1)

    assert rule(findings(divergence=kl), "KL to the reference").outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(-0.02, 0.1, "passed"), (-0.021, 0.1, "undecided"), (-0.1, -0.02, "undecided"), (-0.1, -0.021, "failed")],
)
def test_loss_may_equal_its_limit(low: float, high: float, outcome: str) -> None:
    """Of safety and of sets: at least -0.02."""
    lost = paired(estimate((low + high) / 2, low, high))
    found = findings(sets=(part("helpful"), part("harmless", champion=lost, likelihood=lost)))

    assert rule(found, "accuracy against the champion: helpful").outcome == "passed"
    assert rule(found, "accuracy against the champion: harmless").outcome == outcome
    assert rule(found, "safety set untouched: harmless").outcome == outcome


@pytest.mark.parametrize("limit", [0.0, 0.02])
def test_equal_models_lose_nothing(limit: float) -> None:
    """A difference of exactly 0 passes even where nothing may be lost."""
    same = paired(estimate(0.0, 0.0, 0.0))
    config = GateConfig(safety_sets=("harmless",), max_safety_loss=limit)

    found = findings(sets=(part("helpful"), part("harmless", likelihood=same)))

    assert rule(found, "safety set untouched: harmless", config).outcome == "passed"


def test_undecided_says_how_many_pairs_would_do() -> None:
    """0.60 [0.50, 0.70] from 100 pairs against 0.55: half as wide, so four times as many."""
    found = rule(findings(heldout=part(accuracy=estimate(0.60, 0.50, 0.70, n=100))), "accuracy")

    assert found.outcome == "undecided"
    assert found.reason == (
        "the interval from 100 pairs reaches over the limit; about 400 would decide it if the value stayed at 0.6"
    )


def test_undecided_on_the_wrong_side_counts_the_other_bound() -> None:
    """0.5 [0.2, 0.6] against 0.55: the upper bound, 0.1 away, has to come within 0.05; the lower may stay."""
    found = rule(findings(heldout=part(accuracy=estimate(0.5, 0.2, 0.6, n=50))), "accuracy")

    assert "about 200 would decide it" in found.reason


def test_value_at_the_limit_is_never_decided() -> None:
    """No number of pairs would do."""
    found = rule(findings(heldout=part(accuracy=estimate(0.55, 0.5, 0.6))), "accuracy")

    assert found.outcome == "undecided"
    assert "the value is at it" in found.reason


def test_no_champion_no_rules_about_it() -> None:
    """They do not apply, and the model may pass."""
    verdict = judge(findings(champion=None, comparisons=(comparison("reference"),)), EVERY_RULE)

    apart = [(one.rule, one.reason) for one in verdict.rules if one.outcome == "not_applied"]
    assert apart == [
        ("win rate against the champion", "there is no champion"),
        ("accuracy against the champion", "there is no champion"),
    ]
    assert verdict.passed


@pytest.mark.parametrize(
    ("given", "name", "reason"),
    [
        ({"samples": (), "divergence": None}, "KL to the reference", "no answers were sampled (evaluate.num_prompts)"),
        ({"divergence": None}, "KL to the reference", "temperature 1"),
        ({"samples": ()}, "length growth", "no answers were sampled (evaluate.num_prompts)"),
        ({"samples": (sampled("policy", None),)}, "length growth", "no answers of the reference"),
        ({"comparisons": ()}, "win rate against the reference", "no judge has compared the answers (evaluate.judge)"),
        ({"comparisons": (comparison("reference"),)}, "win rate against the champion", "no judge has compared"),
        ({"comparisons": (), "samples": ()}, "win rate against the champion", "no answers were sampled"),
        ({"sets": (part("x", champion=None),)}, "accuracy against the champion: x", "the champion was not scored"),
        ({"sets": (part("x"), part("y"))}, "safety set untouched: harmless", "of this name, but x, y"),
    ],
)
def test_what_was_not_measured_is_undecided(given: dict[str, object], name: str, reason: str) -> None:
    """It says why, and the model does not pass."""
    found = rule(findings(**given), name)

    assert (found.outcome, found.found) == ("undecided", None)
    assert reason in found.reason
    assert not judge(findings(**given), EVERY_RULE).passed


def test_comparison_with_a_problem_decides_nothing() -> None:
    """Whatever its win rate: a judge that always takes the first answer."""
    found = findings(comparisons=(comparison("reference", problem="the judge always takes the first answer"),))

    asked = rule(found, "win rate against the reference")

    assert (asked.outcome, asked.reason) == ("undecided", "the judge always takes the first answer")
    assert asked.found == GOOD


def test_first_temperature_counts() -> None:
    """Of samples and comparisons the first of each kind."""
    found = findings(
        samples=(sampled("policy", estimate(1.2, 1.1, 1.3)), sampled("policy", estimate(9, 8, 10))),
        comparisons=(comparison("chosen", NONE), comparison("reference"), comparison("reference", NONE)),
    )

    assert rule(found, "length growth").outcome == "passed"
    assert rule(found, "win rate against the reference").outcome == "passed"


def test_single_set_is_the_heldout_one() -> None:
    """Where findings are not broken down by set, the rules on sets look at all pairs."""
    verdict = judge(findings(sets=(), heldout=part("harmless")), EVERY_RULE)

    assert [one.rule for one in verdict.rules][-2:] == [
        "accuracy against the champion: harmless",
        "safety set untouched: harmless",
    ]
    assert verdict.passed


@pytest.mark.parametrize(
    ("accuracy_low", "margin", "learned"),
    [(0.61, 0.2, True), (0.5, 0.2, False), (0.61, 0.0, False), (math.nan, 0.2, False), (0.61, math.nan, False)],
)
def test_chance_is_the_bar_for_having_learned(accuracy_low: float, margin: float, learned: bool) -> None:
    """Whatever the rules ask for: here nothing that could not be had."""
    heldout = part(accuracy=estimate(0.7, accuracy_low, 0.8), margin=estimate(margin, margin, margin))

    verdict = judge(findings(heldout=heldout), GateConfig(min_accuracy=0.0, min_margin=-1.0))

    assert (verdict.learned, verdict.passed) == (learned, learned)


NUMBERS = st.one_of(st.floats(-0.1, 1.2), st.just(math.nan), st.sampled_from([-0.02, 0.0, 0.5, 0.55, math.inf]))
ESTIMATES = st.builds(
    lambda bounds, n: Estimate(low=bounds[0], value=bounds[1], high=bounds[2], n=n),
    st.lists(NUMBERS, min_size=3, max_size=3).map(sorted),
    st.integers(0, 10_000),
)


@given(found=st.lists(ESTIMATES, min_size=7, max_size=7), has_champion=st.booleans(), has_samples=st.booleans())
def test_verdict_is_pure_and_passes_only_if_all_rules_do(
    found: list[Estimate], has_champion: bool, has_samples: bool
) -> None:
    """Any estimates, NaN and infinite ones among them: the same verdict twice, its input untouched, every rule that is
    not passed has a reason, and what passed lies on the right side with its whole interval."""
    accuracy, margin, kl, ratio, win_rate, champion, safety = found
    asked = findings(
        heldout=part(accuracy=accuracy, margin=margin),
        sets=(part("harmless", champion=paired(champion), likelihood=paired(safety)),),
        divergence=Divergence(kl=kl, standard_error=0.1, per_token=0.1),
        samples=(sampled("policy", ratio),) if has_samples else (),
        comparisons=(comparison("reference", win_rate), comparison("champion", win_rate)),
        champion=CHAMPION if has_champion else None,
    )
    before = copy.deepcopy(asked)

    verdict = judge(asked, EVERY_RULE)

    assert repr(judge(asked, EVERY_RULE)) == repr(verdict)
    assert repr(asked) == repr(before)
    if verdict.passed:
        assert verdict.learned
        assert all(one.outcome in ("passed", "not_applied") for one in verdict.rules)
    assert all(one.reason for one in verdict.rules if one.outcome != "passed")
    assert accuracy.low > 0.55 or verdict.rules[0].outcome != "passed"
    assert safety.low >= -0.02 or verdict.rules[-1].outcome != "passed"


@given(found=ESTIMATES, more=st.floats(0, 0.3))
def test_a_stricter_limit_never_helps(found: Estimate, more: float) -> None:
    """What does not pass at a limit does not pass at a higher one."""
    asked = replace(findings(), heldout=part(accuracy=found))
    outcomes = [
        rule(asked, "accuracy", GateConfig(min_accuracy=limit)).outcome == "passed" for limit in (0.5, 0.5 + more)
    ]

    assert outcomes[0] or not outcomes[1]
