"""Rankings to token ids: as their pairs are, and an answer that cannot be used costs no other answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.rankings import Encoded, encode_all
from dpo_train.data.tokens import EncodedPair, PairTokenizer, TokenOptions
from tests.tiny import EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = (Message("user", "tell me about the cat"),)


def encoder(**options: Any) -> PairTokenizer:
    return PairTokenizer(TOKENIZER, TokenOptions(**{"max_prompt_tokens": 99, "max_answer_tokens": 99} | options))


def ranking(*texts: str, prompt: tuple[Message, ...] = PROMPT) -> PreferencePair:
    best, second, *others = (Message("assistant", text) for text in texts)
    return PreferencePair(prompt, best, second, group="g", strength=1.0, others=tuple(others))


def encode(tokenizer: PairTokenizer, *pairs: PreferencePair) -> list[Encoded]:
    return encode_all(tokenizer, pairs)


def texts(found: Encoded) -> list[str]:
    """The answers as their ids say, best first."""
    assert isinstance(found.result, EncodedPair), found.result
    return [TOKENIZER.decode(ids) for ids in found.result.tokens.answer_ids]


def test_ids_are_those_of_the_pairs() -> None:
    """Each two answers of a ranking have the ids that they have as a pair, and so has the prompt."""
    tokenizer, words = encoder(), ("it is kind", "it is warm and calm", "cold", "it is rude")
    plain, found, last = encode(tokenizer, ranking(*words[:2]), ranking(*words), ranking(*words[2:]))
    assert isinstance(found.result, EncodedPair)
    tokens = found.result.tokens
    assert tokens.pair_id == found.pair.pair_id == ranking(*words).pair_id
    for (a, first), (b, second) in combinations(enumerate(words), 2):
        pair = tokenizer.encode(ranking(first, second))
        assert isinstance(pair, EncodedPair)
        assert pair.tokens.prompt_ids.tolist() == tokens.prompt_ids.tolist()
        assert pair.tokens.chosen_ids.tolist() == tokens.answer_ids[a].tolist()
        assert pair.tokens.rejected_ids.tolist() == tokens.answer_ids[b].tolist()
    assert (plain.dropped, found.dropped, found.truncated_others) == ((), (), 0)
    assert texts(plain) == [f"{word}{EOS}" for word in words[:2]]
    assert texts(last) == [f"{word}{EOS}" for word in words[2:]]


BAD = f"it is {EOS} bad"


@pytest.mark.parametrize(
    ("words", "left", "dropped", "strength"),
    [
        (["kind", "warm", BAD, "cold"], ["kind", "warm", "cold"], ["end_token_in_answer: answer 3 of 4"], 1.0),
        (["kind", BAD, "warm", "cold"], ["kind", "warm", "cold"], ["end_token_in_answer: answer 2 of 4"], None),
        ([BAD, "kind", "warm"], ["kind", "warm"], ["end_token_in_answer: answer 1 of 3"], None),
        (["kind", "warm", "kind ", "cold"], ["kind", "warm", "cold"], ["identical_answers: answer 3 of 4"], 1.0),
        (["kind", "warm", "cold", "warm\n"], ["kind", "warm", "cold"], ["identical_answers: answer 4 of 4"], 1.0),
        (
            [BAD, BAD + "x", "kind", BAD + "y", "warm"],
            ["kind", "warm"],
            ["end_token_in_answer: answer 1 of 5", "end_token_in_answer: answer 2 of 5",
             "end_token_in_answer: answer 4 of 5"],
            None,
        ),
    ],
)  # fmt: skip
def test_answer_that_cannot_be_used_leaves_the_ranking(
    words: Sequence[str], left: Sequence[str], dropped: Sequence[str], strength: float | None
) -> None:
    """It is told which one it was; the ranking is then another one, with an id of its own.

    The strength is that of the first two, and unknown where one of them has gone. The template strips white space.
    """
    template = TOKENIZER.chat_template.replace("m['content']", "m['content'] | trim")
    (found,) = encode(encoder(chat_template=template), ranking(*words))
    assert texts(found) == [f"{word}{EOS}" for word in left]
    assert [answer.content for answer in found.pair.answers] == left
    assert found.pair.strength == strength
    assert isinstance(found.result, EncodedPair)
    assert found.result.tokens.pair_id == found.pair.pair_id != ranking(*words).pair_id
    assert [f"{r.reason}: {r.detail.split(':')[0]}" for r in found.dropped] == list(dropped)


@pytest.mark.parametrize(
    ("pair", "options", "reason"),
    [
        (ranking(BAD, BAD + "x", "kind"), {}, "end_token_in_answer"),
        (ranking("kind", BAD, BAD + "x"), {}, "end_token_in_answer"),
        (ranking("kind", "warm", "cold"), {"max_prompt_tokens": 3}, "prompt_too_long"),
        (ranking("kind and warm", "kind and calm", "kind and fair"), {"max_answer_tokens": 1},
         "identical_after_truncation"),
        (ranking("kind", "warm", "calm", prompt=(Message("user", ""),)), {"template": "plain"}, "empty_prompt"),
    ],
)  # fmt: skip
def test_ranking_of_which_no_two_answers_are_left_is_one_rejection(
    pair: PreferencePair, options: dict[str, Any], reason: str
) -> None:
    """With the first reason that was found."""
    (found,) = encode(encoder(**options), pair)
    assert isinstance(found.result, Rejection)
    assert (found.result.reason, found.dropped, found.pair) == (reason, (), pair)


def test_every_cut_answer_is_counted() -> None:
    """Limit of 3 tokens with the end of turn: the first stays, the second and two of three others are cut."""
    words = ("kind", "it is warm and calm", "cold", "sea and sun and road", "hill and lamp and tree")
    (found,) = encode(encoder(max_answer_tokens=3), ranking(*words))
    assert isinstance(found.result, EncodedPair)
    assert [len(ids) for ids in found.result.tokens.answer_ids] == [2, 3, 2, 3, 3]
    assert (found.result.truncated_chosen, found.result.truncated_rejected) == (False, True)
    assert found.truncated_others == 2


def test_answers_that_differ_only_in_what_was_cut_are_told() -> None:
    """The fourth is the third as far as it is kept."""
    words = ("kind", "warm", "it is cold and dull", "it is cold and rude")
    (found,) = encode(encoder(max_answer_tokens=4), ranking(*words))
    assert [answer.content for answer in found.pair.answers] == list(words[:3])
    assert [r.reason for r in found.dropped] == ["identical_after_truncation"]
    assert found.dropped[0].detail == "answer 4 of 4: the same 4 tokens as answer 3"
