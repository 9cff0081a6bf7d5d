"""From single judgements to a win rate, and to whether it can be trusted. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from dpo_train.evaluate.judge.judgement import LOSS, TIE, WIN, Judgement
from dpo_train.evaluate.statistics import wilson
from dpo_train.findings import Comparison, Estimate

ONE_SIDED = 0.95
"""A judge that takes the answer at one position this often does not look at the answers."""
CLEARLY = 0.75
"""And the interval of that share lies beyond this: from 12 decisions of 12 on."""
MOST_UNJUDGED = 0.1
"""Of the answers. Those that a judge can't judge are seldom like the others, so the rest says little about all."""

UNKNOWN = Estimate(value=0.5, low=0.0, high=1.0, n=0)


def win_rate(
    judgements: Sequence[Judgement], prompt_ids: Sequence[str], *, opponent: str, judge: str, temperature: float
) -> Comparison:
    """Counts judgements; ``problem`` says why they prove nothing, where that is so.

    Args:
        judgements: of one judge against one opponent.
        prompt_ids: of each. Several answers to one prompt are not independent: the interval counts prompts.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for judgement, prompt_id in zip(judgements, prompt_ids, strict=True):
        if judgement.outcome is not None:
            by_prompt[prompt_id].append(judgement.outcome)
    outcomes = Counter(judgement.outcome for judgement in judgements)
    means = [sum(found) / len(found) for found in by_prompt.values()]
    first_wins = _first_wins(judgements)
    agreement, chance = _agreement(judgements)
    return Comparison(
        opponent=opponent,
        judge=judge,
        temperature=temperature,
        wins=outcomes[WIN],
        ties=outcomes[TIE],
        losses=outcomes[LOSS],
        unjudged=outcomes[None],
        win_rate=_share(sum(means), len(means)) or UNKNOWN,
        first_wins=first_wins,
        agreement=agreement,
        problem=_problem(judgements, first_wins, agreement, chance),
    )


def _share(successes: float, trials: int) -> Estimate | None:
    return wilson(successes, trials, n=trials) if trials else None


def _first_wins(judgements: Sequence[Judgement]) -> Estimate | None:
    """Share of decisions for the answer that came first."""
    orders = [judgement.orders for judgement in judgements if judgement.orders is not None]
    decided = [found[0] for found in orders] + [None if found[1] is None else 1 - found[1] for found in orders]
    decided = [first for first in decided if first in (WIN, LOSS)]
    return _share(sum(first == WIN for first in decided), len(decided))


def _agreement(judgements: Sequence[Judgement]) -> tuple[Estimate | None, float]:
    """How often both orders gave the same, and how often they would by a judge that looks at positions alone.

    Such a judge takes the first answer with some probability f, the second with s, neither with t. It contradicts
    itself whenever it takes the same position twice, so that it agrees with probability 2 f s + t^2.
    """
    both = [
        judgement.orders for judgement in judgements if judgement.orders is not None and None not in judgement.orders
    ]
    if not both:
        return None, 0.0
    seen = Counter(found[0] for found in both) + Counter(1 - (found[1] or 0.0) for found in both)
    first, second, tie = (seen[outcome] / (2 * len(both)) for outcome in (WIN, LOSS, TIE))
    return _share(sum(ours == theirs for ours, theirs in both), len(both)), 2 * first * second + tie**2


def _problem(
    judgements: Sequence[Judgement], first_wins: Estimate | None, agreement: Estimate | None, chance: float
) -> str | None:
    """In words for people; None: nothing is wrong."""
    unjudged = sum(judgement.outcome is None for judgement in judgements)
    if unjudged == len(judgements):
        return (
            "there are no judgements"
            if not judgements
            else f"the judge said nothing usable about any of {unjudged} answers"
        )
    if unjudged > MOST_UNJUDGED * len(judgements):
        return f"the judge said nothing usable about {unjudged} of {len(judgements)} answers"
    if first_wins is not None:
        for position, share, low in (
            ("first", first_wins.value, first_wins.low),
            ("second", 1 - first_wins.value, 1 - first_wins.high),
        ):
            if share >= ONE_SIDED and low > CLEARLY:
                return (
                    f"the judge takes the {position} answer in {share:.0%} of its {first_wins.n} decisions, whatever "
                    "the answers are"
                )
    if agreement is not None and min(agreement.value, agreement.low) <= chance:
        return (
            f"the judge says the same in both orders for {agreement.value:.0%} of {agreement.n} prompts, where "
            f"{chance:.0%} would come about without looking at the answers: the difference may be chance"
        )
    return None
