"""Win rates, and the reasons not to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.evaluate.judge import Judgement, win_rate
from dpo_train.findings import Comparison

OUTCOMES = {"w": 1.0, "t": 0.5, "l": 0.0, "-": None}


def _orders(pairs: str) -> list[Judgement]:
    """ "ww wl": the outcome with ours first, then with theirs first, of each matchup."""
    found = []
    for both in pairs.split():
        first, second = OUTCOMES[both[0]], OUTCOMES[both[1]]
        outcome = None if first is None or second is None else first if first == second else 0.5
        found.append(Judgement(outcome=outcome, orders=(first, second)))
    return found


def _rewarded(outcomes: str) -> list[Judgement]:
    return [Judgement(outcome=OUTCOMES[each]) for each in outcomes]


def _rate(judgements: Sequence[Judgement], prompt_ids: Sequence[str] | None = None) -> Comparison:
    ids = [str(number) for number in range(len(judgements))] if prompt_ids is None else prompt_ids
    return win_rate(judgements, ids, opponent="reference", judge="j", temperature=1.0)


def test_ties_count_half() -> None:
    """2 wins, 2 ties and a loss: 3 of 5. Of a judge that rewards there is no order to speak of."""
    found = _rate(_rewarded("wwttl"))
    assert (found.wins, found.ties, found.losses, found.unjudged) == (2, 2, 1, 0)
    assert (found.win_rate.value, found.win_rate.n) == (0.6, 5)
    assert (found.first_wins, found.agreement, found.problem) == (None, None, None)


def test_interval_is_wilsons_over_prompts() -> None:
    """3 of 4 prompts: z^2 = 3.8415, centre (0.75 + 0.4802) / 1.9604 = 0.6275, half 0.3269.

    Answering each prompt twice does not make more of them.
    """
    for repeats in (1, 2):
        found = _rate(_rewarded("wwwl" * repeats), ["a", "b", "c", "d"] * repeats).win_rate
        assert (found.value, found.n) == (0.75, 4)
        assert (found.low, found.high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))


def test_bias_and_agreement_are_counted() -> None:
    """ww: A, B; ll: B, A; wl: A, A; tw: tie, B. A is taken 4 times of 7; 2 of 4 agree."""
    found = _rate(_orders("ww ll wl tw"))
    assert found.first_wins is not None
    assert found.agreement is not None
    assert (found.first_wins.value, found.first_wins.n) == (pytest.approx(4 / 7), 7)
    assert (found.agreement.value, found.agreement.n) == (0.5, 4)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)


@pytest.mark.parametrize(
    ("judgements", "words"),
    [
        ([], "there are no judgements"),
        (_orders("-- -- w-"), "nothing usable about any of 3 answers"),
        (_rewarded("w" * 17 + "---"), "nothing usable about 3 of 20 answers"),
        (_orders("wl " * 10), "takes the first answer in 100% of its 20 decisions"),
        (_orders("lw " * 10), "takes the second answer in 100% of its 20 decisions"),
        # Of 20 matchups half agree, as with a coin for each order.
        (_orders("ww ll wl lw " * 5), "the same in both orders for 50% of 20 prompts, where 50% would come about"),
        # Too few to show more than chance, although it never contradicts itself but once.
        (_orders("ww ll wl"), "the difference may be chance"),
        # Always a tie: it says the same, but nothing.
        (_orders("tt " * 50), "the same in both orders for 100% of 50 prompts, where 100% would come about"),
        (_orders("wl " * 3), "the same in both orders for 0% of 3 prompts"),
    ],
)
def test_judge_that_proves_nothing_is_named(judgements: list[Judgement], words: str) -> None:
    """No rule may rest on such a comparison; the words say why."""
    problem = _rate(judgements).problem
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(
    "judgements",
    [
        _orders("ww " * 20),  # ours is always better: it agrees with itself by far more than chance
        _orders("ww ll " * 10),
        _orders("ww ww ww ll tt wt " * 6),
        _orders("ww " * 40 + "wl " * 10),  # some lean to the first answer is not a judge that does not look
        _orders("ww " * 18 + "-- " * 2),  # 10 % unjudged are borne
        _rewarded("t" * 20),
    ],
)
def test_usable_judge_is_used(judgements: list[Judgement]) -> None:
    """Good judges are not perfect."""
    assert _rate(judgements).problem is None


def test_coin_is_found_out() -> None:
    """A judge that throws a coin for each order agrees half of the time: found out in 95 of 100 trials of 64."""
    random = Random(0)
    trials = [
        _rate(_orders(" ".join(random.choice("wl") + random.choice("wl") for _ in range(64)))) for _ in range(100)
    ]
    assert sum(trial.problem is not None for trial in trials) >= 95


@given(st.lists(st.sampled_from([a + b for a in "wtl-" for b in "wtl-"]), max_size=40))
def test_every_judgement_is_counted_once(pairs: list[str]) -> None:
    """And the estimate lies within its interval; exchanging the sides turns the rate round."""
    found = _rate(_orders(" ".join(pairs)))
    assert found.wins + found.ties + found.losses + found.unjudged == len(pairs)
    assert 0 <= found.win_rate.low <= found.win_rate.value <= found.win_rate.high <= 1
    swapped = _rate(_orders(" ".join(pair.translate(str.maketrans("wl", "lw"))[::-1] for pair in pairs)))
    assert swapped.win_rate.value == pytest.approx(1 - found.win_rate.value)
    assert (swapped.first_wins, swapped.agreement) == (found.first_wins, found.agreement)
