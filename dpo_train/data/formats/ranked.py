"""The formats with several answers to a prompt, each with a score or a rank: one record, one or many pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.assemble import Shared, answer_of, check_encodable, make_pair, share
from dpo_train.data.formats.messages import check_answer
from dpo_train.data.formats.reasons import RejectedError, reject
from dpo_train.data.formats.transcripts import prompt_turns
from dpo_train.data.formats.values import Columns, is_empty, items, look_up, names_of, number, wrong_type
from dpo_train.data.pairs import Message, PreferencePair, Rejection

Outcome = PreferencePair | Rejection
Scored = tuple[float, Message]

PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("answers", "responses", "generations", "completions")
TEXTS = ("answer", "response", "completion", "text", "content")
RANKS = ("rank", "ranks")
RATINGS = ("score", "scores", "rating", "ratings")


def read_ultrafeedback(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `ultrafeedback`: completions, each with an overall score or ratings of its aspects."""
    completions = items(columns.need("completions"), columns.name("completions"))
    prompt = prompt_turns(columns.need("prompt", "instruction"), columns.name("prompt", "instruction"))
    shared = share(columns, source, prompt, ("source",))
    score = _completion_score(columns, completions)
    text = columns.mapped.get("response", "response")

    def read(index: int, item: Any) -> Scored:
        name = f"completions[{index}]"
        if not isinstance(item, Mapping):
            raise wrong_type(name, item, "an object")
        return score(item, name), answer_of(_needed(look_up(item, text), f"{name}.{text}", item), name)

    return _pairs(shared, *_usable(completions, read), source)


def read_ranking(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `ranking`: answers with a rank (1 is the best) or a score (the highest is the best)."""
    answers = items(columns.need(*ANSWERS), columns.name(*ANSWERS))
    prompt = prompt_turns(columns.need(*PROMPTS), columns.name(*PROMPTS))
    shared = share(columns, source, prompt, ("source", "dataset", "domain"))
    sign, beside = _beside(columns, answers)

    def read(index: int, item: Any) -> Scored:
        name = f"answers[{index}]"
        if beside:
            return sign * number(beside[index], f"the score of {name}"), answer_of(item, name)
        if not isinstance(item, Mapping):
            raise wrong_type(name, item, "an object with an answer and its rank or score")
        own = Columns(item, columns.mapped)
        value = own.find("answer", *TEXTS) if item.get("role") is None else item
        answer = answer_of(_needed(value, f"{name}.answer", item), name)
        if not is_empty(own.find("rank")):
            return -number(own.find("rank"), f"the rank of {name}"), answer
        return number(_needed(own.find("score", *RATINGS), f"{name}.rank", item), f"the score of {name}"), answer

    return _pairs(shared, *_usable(answers, read), source)


def _usable(answers: Sequence[Any], read: Callable[[int, Any], Scored]) -> tuple[list[Scored], list[Rejection]]:
    """The answers that can be ranked, best first, and a rejection for each of the others."""
    scored, broken = [], []
    for index, item in enumerate(answers):
        try:
            score, answer = read(index, item)
            check_answer(answer, f"answer {index + 1} of {len(answers)}")
            scored.append((score, answer))
        except RejectedError as error:
            broken.append(error.rejection)
    # Stable: of answers with the same score the record's first stays first.
    return sorted(scored, key=lambda pair: -pair[0]), broken


def _pairs(shared: Shared, scored: list[Scored], broken: list[Rejection], source: SourceConfig) -> list[Outcome]:
    """The candidates: the best answer against the worst, each against each that scored lower, or all in their order."""
    if len(scored) < 2:
        why = f"; {broken[0].reason}: {broken[0].detail}" if broken else ""
        return [reject("too_few_answers", f"{len(scored)} of {len(scored) + len(broken)} can be used{why}")]
    if scored[0][0] == scored[-1][0]:
        return [reject("tie", f"{len(scored)} answers scored the same")]
    if source.pairing == "ranking":
        return _ranking(shared, scored, broken, source)
    outcomes: list[Outcome] = []
    for (high, better), (low, worse) in _couples(scored, source.pairing):
        try:
            outcomes.append(make_pair(shared, better, worse, source, strength=high - low))
        except RejectedError as error:
            outcomes.append(error.rejection)
    # A record that gives no pair is one rejection.
    return [*outcomes, *broken] if any(isinstance(o, PreferencePair) for o in outcomes) else outcomes[:1]


def _ranking(shared: Shared, scored: list[Scored], broken: list[Rejection], source: SourceConfig) -> list[Outcome]:
    """One candidate of all answers, and a rejection for each that has no place of its own in their order."""
    kept: list[Scored] = []
    for score, answer in scored:
        try:
            _check_place(score, answer, kept, shared, source)
            kept.append((score, answer))
        except RejectedError as error:
            broken = [*broken, error.rejection]
    if len(kept) < 2:
        return [broken[-1]]
    (high, best), (low, second), *others = kept
    pair = make_pair(shared, best, second, source, strength=high - low)
    return [replace(pair, others=tuple(answer for _, answer in others)), *broken]


def _check_place(score: float, answer: Message, kept: list[Scored], shared: Shared, source: SourceConfig) -> None:
    """A ranking is a strict order of different answers, each min_strength or more below the one before it."""
    check_encodable(answer.content, answer.extra)
    if any(answer == other for _, other in kept):
        raise RejectedError("identical_answers", "the same answer is ranked higher")
    gap = kept[-1][0] - score if kept else None
    if gap == 0:
        raise RejectedError("tie", "an answer that stays has the same rank or score")
    if gap is not None and shared.strength is None and gap < source.min_strength:
        raise RejectedError("below_min_strength", f"{gap:g}, at least {source.min_strength:g}")


def _couples(scored: list[Scored], pairing: str) -> list[tuple[Scored, Scored]]:
    if pairing == "all":
        return [(high, low) for high, low in combinations(scored, 2) if high[0] > low[0]]
    worst = next(item for item in scored if item[0] == scored[-1][0])
    return [(scored[0], worst)]


def _completion_score(columns: Columns, completions: Sequence[Any]) -> Callable[[Mapping[Any, Any], str], float]:
    """One kind of score for all completions of a record: numbers of two kinds do not compare."""
    if "score" in columns.mapped:
        names: tuple[str, ...] = (columns.mapped["score"],)
    else:
        names = ("overall_score", "fine-grained_score")
    for name in names:
        if any(isinstance(item, Mapping) and not is_empty(look_up(item, name)) for item in completions):
            return lambda item, where: number(_needed(look_up(item, name), f"{where}.{name}", item), f"{where}.{name}")
    if "score" in columns.mapped:
        return lambda item, where: number(_needed(None, f"{where}.{names[0]}", item), where)
    return _mean_rating


def _mean_rating(item: Mapping[Any, Any], where: str) -> float:
    """Mean of the aspects' ratings (helpfulness, honesty, ...); one that is N/A does not count."""
    aspects = item.get("annotations")
    values = aspects.values() if isinstance(aspects, Mapping) else ()
    ratings = [aspect.get("Rating") for aspect in values if isinstance(aspect, Mapping)]
    known = [value for value in ratings if not is_empty(value) and not (isinstance(value, str) and value == "N/A")]
    found = [number(value, f"a rating of {where}") for value in known]
    if not found:
        raise RejectedError("missing_field", f"{where} has neither overall_score, fine-grained_score nor ratings")
    return sum(found) / len(found)


def _beside(columns: Columns, answers: Sequence[Any]) -> tuple[int, Sequence[Any]]:
    """(sign, values) of ranks or scores in a list of their own beside texts; no values where answers have their own."""
    if not all(isinstance(item, str) for item in answers):
        return 1, ()
    for sign, names in ((-1, RANKS), (1, RATINGS)):
        value = columns.find(*names)
        if is_empty(value):
            continue
        found = items(value, columns.name(*names))
        if len(found) != len(answers):
            raise RejectedError(
                "wrong_type", f"{columns.name(*names)} has {len(found)} values for {len(answers)} answers"
            )
        return sign, found
    return 1, ()


def _needed(value: Any, name: str, item: Mapping[Any, Any]) -> Any:
    if value is None:
        there = names_of(item) or "nothing"
        raise RejectedError("missing_field", f"no {name}, where there is {there}")
    return value
