"""What an evaluation finds, as plain values: the report shows them, the gate judges them, the registry reads them.

Every number that rests on a sample comes as an Estimate: with its 95 % interval and the count behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["passed", "failed", "undecided", "not_applied"]
"""Of a rule. ``undecided``: its interval reaches over the limit, so that more data might show either."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % confidence interval and the count it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of the reliability plot: pairs of which the policy was about equally sure."""

    low: float
    high: float
    confidence: float
    """Mean of sigmoid(|margin|), the probability that Bradley-Terry gives to the answer with the larger reward."""
    accuracy: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Pairs that have something in common."""

    name: str
    accuracy: Estimate
    margin: Estimate


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Whether the policy prefers answers for being long. None: there is no pair of which it could be told."""

    correlation: Estimate | None
    """Spearman's, of margin and difference in length (chosen - rejected, tokens); None where one never varies."""
    prefers_longer: Estimate | None
    """Share of the pairs of unequal length in which the policy prefers the longer answer."""
    data_prefers_longer: Estimate | None
    """The same of the data's own preferences."""
    chosen_longer: Estimate | None
    """Accuracy where the chosen answer is the longer one."""
    chosen_shorter: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two models on the same pairs."""

    difference: Estimate
    """Accuracy of the first minus that of the second."""
    p_value: float
    """Two-sided, that there is no difference."""
    better: int
    worse: int
    """Pairs that only the first, and only the second, has right."""


@dataclass(frozen=True, kw_only=True)
class SetFindings:
    """Held-out preferences of one set."""

    name: str
    is_trained_on: bool
    """Whether training pairs come from the same source; else the set lies outside the training distribution."""
    accuracy: Estimate
    margin: Estimate
    chosen_reward: Estimate
    rejected_reward: Estimate
    calibration_error: Estimate
    """Expected calibration error (ECE) of sigmoid(margin)."""
    reliability: tuple[Bin, ...]
    by_origin: tuple[Slice, ...]
    by_length: tuple[Slice, ...]
    by_strength: tuple[Slice, ...]
    length_bias: LengthBias
    likelihood: Paired
    """Policy against reference by plain log-probs: whose likelier answer is the chosen one more often?"""
    champion: Paired | None = None
    """Policy against champion by the reward of each, over the same reference."""
    drop: Estimate | None = None
    """Of a set that is not trained on: its accuracy minus that of the sets that are."""


@dataclass(frozen=True, kw_only=True)
class SampleFindings:
    """What one model's sampled answers look like."""

    model: str
    """"policy", "reference" or "champion"."""
    temperature: float
    length: Estimate
    """Tokens of an answer, its end token not counted."""
    length_ratio: Estimate | None
    """Mean length over the reference's at the same temperature; None for the reference itself."""
    repetition: Estimate
    """Share of an answer's 4-grams that came before in it."""
    distinct_1: float
    distinct_2: float
    """Different 1-grams and 2-grams over all of them (arXiv 1510.03055)."""
    empty: Estimate
    truncated: Estimate
    """Share of answers without a visible character, and of those cut off at the longest length."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(policy || reference) in nats per answer, from answers that the policy gave at temperature 1."""

    kl: Estimate
    standard_error: float
    per_token: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The policy's answers against another's, by a judge."""

    opponent: str
    """"reference", "chosen" (the data's answers), "champion", or "best of N" of the reference."""
    judge: str
    temperature: float
    wins: int
    ties: int
    losses: int
    unjudged: int
    """Answers that the judge said nothing usable about; they count nowhere else."""
    win_rate: Estimate
    """Ties count half; Wilson's interval over prompts."""
    first_wins: Estimate | None = None
    """Of a judge that sees two answers: how often it takes the one it sees first (fair: 0.5)."""
    agreement: Estimate | None = None
    """How often it says the same in both orders."""
    problem: str | None = None
    """Why no rule may rest on this comparison."""


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The registered version that the policy is compared with."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All numbers of an evaluation."""

    beta: float
    heldout: SetFindings
    """The held-out pairs of all sets that are trained on; of all sets where none is."""
    sets: tuple[SetFindings, ...] = ()
    """Each set by itself, where there are several."""
    divergence: Divergence | None = None
    samples: tuple[SampleFindings, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    champion: Champion | None = None
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """One rule of the gate: what was asked, what was found, and what follows."""

    rule: str
    outcome: Outcome
    limit: str
    """As people read it: "above 0.5"."""
    found: Estimate | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's answer. ``passed`` only if every rule that applies has passed."""

    learned: bool
    passed: bool
    rules: tuple[RuleResult, ...] = field(default=())
