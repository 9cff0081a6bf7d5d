"""The formats with two answers and a verdict on them: a label, a choice, a vote, a signed strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.assemble import answer_of, make_pair, share
from dpo_train.data.formats.messages import read_turns
from dpo_train.data.formats.reasons import RejectedError
from dpo_train.data.formats.transcripts import marked_turns, prompt_turns
from dpo_train.data.formats.values import (
    Columns,
    is_empty,
    is_list,
    items,
    look_up,
    missing,
    number,
    optional_number,
    structure,
    text,
    wrong_type,
)
from dpo_train.data.pairs import Message, PreferencePair, Rejection

Outcome = PreferencePair | Rejection
Turns = tuple[Message, ...]

WINNERS: Mapping[str, int | None] = {
    "model_a": 0,
    "a": 0,
    "model_b": 1,
    "b": 1,
    "tie": None,
    "tie (bothbad)": None,
    "both_bad": None,
    "bothbad": None,
}
MAX_HELPSTEER = 3
"""HelpSteer's annotators write -3 to 3, and -100 where neither answer can be used."""


def read_shp(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `shp`: a post, two comments with their scores, and a label that is 1 where A is preferred."""
    answers = _two(columns, "human_ref_A", "human_ref_B")
    scores = [optional_number(columns.find(name), columns.name(name)) for name in ("score_A", "score_B")]
    lead = None if None in scores else scores[0] - scores[1]  # type: ignore[operator] # None has been ruled out
    if not is_empty(columns.find("labels")):
        winner: int | None = 1 - _bit(columns.find("labels"), columns.name("labels"))
    elif lead is None:
        raise missing(columns, "labels")
    else:
        winner = None if lead == 0 else int(lead < 0)
    chosen, rejected = _verdict(answers, winner)
    lead = -lead if lead is not None and winner == 1 else lead
    if lead is not None and lead < 0:
        raise RejectedError("chosen_scored_lower", f"by {-lead:g}")
    shared = share(columns, source, prompt_turns(columns.need("history"), columns.name("history")), ("domain",))
    ratio = optional_number(columns.find("score_ratio"), columns.name("score_ratio"))
    return [make_pair(shared, chosen, rejected, source, strength=lead if ratio is None else ratio)]


def read_tldr(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `tldr`: a post or an article, two summaries, and the place of the preferred one."""
    info = structure(columns.need("info"), columns.name("info"))
    if not isinstance(info, Mapping):
        raise wrong_type("info", info, "an object")
    summaries = items(columns.need("summaries"), columns.name("summaries"))
    if len(summaries) != 2:
        raise RejectedError("wrong_type", f"summaries has {len(summaries)} entries, expected 2")
    texts = [look_up(item, "text") if isinstance(item, Mapping) else item for item in summaries]
    answers = tuple(Message("assistant", text(value, f"summaries[{i}].text")) for i, value in enumerate(texts))
    chosen, rejected = _verdict(answers, _bit(columns.need("choice"), columns.name("choice")))
    prompt = (Message("user", _post(info)),)
    origin = {name: info.get(name) for name in ("subreddit", "site")}
    shared = share(Columns({**columns.record, **origin}, columns.mapped), source, prompt, tuple(origin))
    return [make_pair(shared, chosen, rejected, source)]


def read_arena(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `arena`: two answers or conversations, and a vote."""
    winner = _winner(columns)
    if winner is None:
        raise RejectedError("tie")
    if columns.find("conversation_a") is not None:
        both = [_conversation(columns, name) for name in ("conversation_a", "conversation_b")]
    else:
        both = _responses(columns)
    (*lead, first), (*other, second) = both
    if lead != other:
        # Both models have heard their own earlier answers, so later ones answer two different conversations.
        raise RejectedError("prompt_differs", "the conversations part before their last turn")
    shared = share(columns, source, tuple(lead))
    return [make_pair(shared, *_verdict((first, second), winner), source)]


def read_helpsteer(columns: Columns, source: SourceConfig) -> list[Outcome]:
    """The format `helpsteer`: two answers and a strength from -3 (the first is much better) to 3 (the second)."""
    answers = _two(columns, ("response_1", "response1"), ("response_2", "response2"))
    names = "prompt", "context"
    prompt = columns.need(*names)
    is_marked = isinstance(prompt, str) and "<extra_id_1>" in prompt
    turns = marked_turns(prompt) if is_marked else prompt_turns(prompt, columns.name(*names))
    verdict = "preference_strength", "overall_preference"
    strength = number(columns.need(*verdict), columns.name(*verdict))
    if abs(strength) > MAX_HELPSTEER:
        raise RejectedError("wrong_type", f"{columns.name(*verdict)} is {strength:g}, expected -3 to 3")
    chosen, rejected = _verdict(answers, None if strength == 0 else int(strength > 0))
    shared = share(columns, source, turns, ("domain",))
    agreement = _agreement(columns, strength)
    return [make_pair(shared, chosen, rejected, source, strength=abs(strength), agreement=agreement)]


def _two(columns: Columns, first: str | tuple[str, ...], second: str | tuple[str, ...]) -> tuple[Message, ...]:
    names = [(name,) if isinstance(name, str) else name for name in (first, second)]
    if absent := [name[0] for name in names if columns.find(*name) is None]:
        raise missing(columns, *absent)
    return tuple(answer_of(columns.find(*name), columns.name(*name)) for name in names)


def _verdict(answers: tuple[Message, ...], winner: int | None) -> tuple[Message, Message]:
    """(chosen, rejected); nobody's victory is a rejection."""
    if winner is None:
        raise RejectedError("tie")
    return answers[winner], answers[1 - winner]


def _bit(value: Any, name: str) -> int:
    found = number(value, name)
    if found not in (0, 1):
        raise RejectedError("wrong_type", f"{name} is {found:g}, expected 0 or 1")
    return int(found)


def _post(info: Mapping[Any, Any]) -> str:
    """The prompt that the data's authors trained on: post with subreddit and title, or an article."""
    post, article = (info.get(name) for name in ("post", "article"))
    if not is_empty(post):
        parts = (("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title")), ("POST: ", post))
    elif not is_empty(article):
        parts = (("TITLE: ", info.get("title")), ("ARTICLE: ", article), ("", None))
    else:
        raise RejectedError("missing_field", "no info.post and no info.article")
    written = [f"{label}{text(value, 'a part of info')}\n\n" for label, value in parts if not is_empty(value)]
    return "".join(written) + "TL;DR:"


def _winner(columns: Columns) -> int | None:
    vote = columns.find("winner")
    if vote is not None:
        name = columns.name("winner")
        key = text(vote, name).strip().lower()
        if key not in WINNERS:
            raise RejectedError("wrong_type", f"{name} is {key[:40]!r}, expected {', '.join(WINNERS)}")
        return WINNERS[key]
    better = columns.find("better_response_id")
    if better is not None:
        return _bit(better, columns.name("better_response_id"))
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    if any(is_empty(columns.find(name)) for name in names[:2]):
        raise missing(columns, "winner")
    flags = [0 if is_empty(columns.find(name)) else _bit(columns.find(name), columns.name(name)) for name in names]
    if sum(flags) > 1:
        raise RejectedError("wrong_type", "more than one of winner_model_a, winner_model_b and winner_tie is 1")
    # Without a 1 anywhere nobody has won either.
    return flags.index(1) if 1 in flags[:2] else None


def _conversation(columns: Columns, name: str) -> Turns:
    turns = read_turns(items(columns.need(name), columns.name(name)), columns.name(name))
    if not turns or turns[-1].role != "assistant":
        raise RejectedError("last_turn_not_assistant", columns.name(name))
    return turns


def _responses(columns: Columns) -> list[Turns]:
    """Prompt and answers as texts; or as JSON lists of texts, one for each turn, as LMSYS publishes them."""
    names = [("prompt",), ("response_a", "response_0"), ("response_b", "response_1")]
    values = [columns.need(*name) for name in names]
    lists = [_texts(value) for value in values]
    if None in lists or len({len(turns or ()) for turns in lists}) != 1:
        prompt = prompt_turns(values[0], columns.name("prompt"))
        answers = (answer_of(value, columns.name(*name)) for value, name in zip(values[1:], names[1:], strict=True))
        return [(*prompt, answer) for answer in answers]
    asked, *said = lists
    return [
        tuple(
            Message(role, text(value, "a turn"))
            for turn in zip(asked or (), answers or (), strict=True)
            for role, value in zip(("user", "assistant"), turn, strict=True)
        )
        for answers in said
    ]


def _texts(value: Any) -> list[Any] | None:
    """The texts of a list of texts and nulls, also one written as JSON; None where it is none."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = structure(value, "")
        except RejectedError:
            return None
    if not is_list(value) or not value or not all(item is None or isinstance(item, str) for item in value):
        return None
    return list(value)


def _agreement(columns: Columns, strength: float) -> float | None:
    """Share of the annotators who prefer the same answer; None where their votes are not there."""
    for name, key in (("individual_preference", "score"), ("all_preferences_unprocessed", "strength")):
        votes = columns.find(name)
        if is_empty(votes):
            continue
        found = [item.get(key) if isinstance(item, Mapping) else None for item in items(votes, columns.name(name))]
        numbers = [number(value, f"a {key} of {columns.name(name)}") for value in found if not is_empty(value)]
        agree = sum(abs(vote) <= MAX_HELPSTEER and vote * strength > 0 for vote in numbers)
        return agree / len(numbers) if numbers else None
    return None
