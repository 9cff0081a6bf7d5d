"""Rankings to token ids, by way of pairs: the best answer with each of the others.

    ranking of K -> K - 1 pairs that share their best answer --PairTokenizer--> ids -> one ranking again

An answer that cannot be used leaves the ranking and is a rejection of its own; the others keep their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpo_train.data.pairs import PreferencePair, Rejection
from dpo_train.data.tokens import EncodedPair, PairTokenizer

OF_PROMPT = frozenset({"empty_prompt", "prompt_too_long"})
"""Reasons that no other answer would change."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A pair or ranking of the answers that can be used, with its token ids; or why there is none."""

    pair: PreferencePair
    result: EncodedPair | Rejection
    truncated_others: int = 0
    """Answers from the third on that were cut."""
    dropped: tuple[Rejection, ...] = ()
    """For each answer that left the ranking why it did."""


def encode_all(tokenizer: PairTokenizer, pairs: Sequence[PreferencePair]) -> list[Encoded]:
    """Token ids of pairs and rankings, in the order given."""
    couples = [_couples(pair) for pair in pairs]
    results = iter(tokenizer.encode_many([couple for some in couples for couple in some]))
    found = [(pair, [next(results) for _ in some]) for pair, some in zip(pairs, couples, strict=True)]
    return [_joined(tokenizer, pair, some) if pair.others else Encoded(pair, some[0]) for pair, some in found]


def _couples(pair: PreferencePair) -> list[PreferencePair]:
    """The best answer against each of the others."""
    return [replace(pair, rejected=answer, others=()) for answer in pair.answers[1:]] if pair.others else [pair]


def _joined(
    tokenizer: PairTokenizer, pair: PreferencePair, results: Sequence[EncodedPair | Rejection], before: int = 0
) -> Encoded:
    """The ranking of its couples; ``before`` answers of the record have left it already."""
    first, count = results[0], before + len(pair.answers)
    if all(isinstance(result, Rejection) for result in results):
        if isinstance(first, Rejection) and first.reason in OF_PROMPT:
            return Encoded(pair, first)
        return _without_best(tokenizer, pair, first, before)
    kept, dropped = [0], []
    tokens: dict[tuple[int, ...], int] = {}
    good: list[EncodedPair] = []
    for place, result in enumerate(results, 1):
        outcome = _twin(result, tokens, before + place + 1) if isinstance(result, EncodedPair) else result
        if isinstance(outcome, Rejection):
            dropped.append(_of_answer(outcome, before + place + 1, count))
        else:
            kept.append(place)
            good.append(outcome)
    best, *others = good
    answers = [pair.answers[place] for place in kept]
    # What is known of the strength is about the first two.
    strength = pair.strength if kept[1] == 1 else None
    ranking = replace(pair, rejected=answers[1], others=tuple(answers[2:]), strength=strength)
    ids = replace(best.tokens, pair_id=ranking.pair_id, other_ids=tuple(other.tokens.rejected_ids for other in others))
    return Encoded(
        ranking, best._replace(tokens=ids), sum(other.truncated_rejected for other in others), tuple(dropped)
    )


def _without_best(
    tokenizer: PairTokenizer, pair: PreferencePair, result: EncodedPair | Rejection, before: int
) -> Encoded:
    """No answer goes with the best one, so it is tried without."""
    assert isinstance(result, Rejection)
    _, second, *rest = pair.answers
    if not rest:
        return Encoded(pair, result)
    shorter = replace(pair, chosen=second, rejected=rest[0], others=tuple(rest[1:]), strength=None)
    found = _joined(tokenizer, shorter, tokenizer.encode_many(_couples(shorter)), before + 1)
    if isinstance(found.result, Rejection):
        return Encoded(pair, result)
    own = _of_answer(result, before + 1, before + len(pair.answers))
    return replace(found, dropped=(own, *found.dropped))


def _twin(result: EncodedPair, tokens: dict[tuple[int, ...], int], number: int) -> EncodedPair | Rejection:
    """A rejection if an answer that is ranked higher has the same tokens."""
    ids = tuple(result.tokens.rejected_ids.tolist())
    first = tokens.setdefault(ids, number)
    if first == number:
        return result
    reason = "identical_after_truncation" if result.truncated_rejected else "identical_answers"
    return Rejection(reason, f"the same {len(ids)} tokens as answer {first}")


def _of_answer(rejection: Rejection, number: int, count: int) -> Rejection:
    return replace(rejection, detail=f"answer {number} of {count}: {rejection.detail}".removesuffix(": "))
