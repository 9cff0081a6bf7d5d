"""One bad line between two good ones: what becomes of each record."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.config import RunConfig
from tests.unit.stages.bad_data.cases import (
    DEEP,
    JARGON,
    LONG,
    ZERO_WIDTH,
    A,
    B,
    Bad,
    good,
    lines,
    null,
    prepared,
    talk,
    vote,
    write,
)

BAD_RECORDS: dict[str, Bad] = {
    # no record
    "cut in the middle": Bad(A[:30], "undecodable", "no JSON: unterminated string"),
    "no JSON at all": Bad(b"hello", "undecodable", "no JSON: expecting value, at character 0"),
    "printed by Python": Bad(b"{'prompt': 'cat'}", "undecodable", "no JSON: expecting property name"),
    "comma behind a line": Bad(A.strip() + b",", "undecodable", "more text after the value"),
    "two records in a line": Bad(A.strip() + B.strip(), "undecodable", "more text after the value"),
    "two records with a lone CR between": Bad(
        A.strip() + b"\r" + B.strip(), "undecodable", "more text after the value"
    ),
    "NUL bytes": Bad(b"\0" * 8, "undecodable", "no JSON"),
    "NUL byte in a text": Bad(A.strip().replace(b"cat", b"c\0t"), "undecodable", "invalid control character"),
    "Latin-1": Bad(A.strip().replace(b"cat", b"caf\xe9"), "undecodable", "byte 0xe9 at position 29 is not UTF-8"),
    "lone surrogate, escaped": Bad(A.strip().replace(b"cat", b"\\ud800"), "undecodable", "a lone surrogate"),
    "lone surrogate, raw": Bad(A.strip().replace(b"cat", b"\xed\xa0\x80"), "undecodable", "byte 0xed"),
    "two million brackets": Bad(DEEP, "undecodable", "deeper than can be read"),
    "number of 5,000 digits": Bad(b'{"margin": ' + b"1" * 5000 + b"}", "undecodable", "more than 4300 digits"),
    "key twice": Bad(A.strip()[:-1] + b', "chosen": "calm"}', "undecodable", "the key 'chosen' stands twice"),
    "a list": Bad([good(9)], "not_an_object", "got a list, expected an object"),
    "a number": Bad(3, "not_an_object", "got a number"),
    "a text": Bad("cat", "not_an_object", "got text"),
    "null": Bad(b"null", "not_an_object", "got null"),
    "a boolean": Bad(True, "not_an_object", "got a boolean"),
    # fields
    "no field": Bad({}, "missing_field", "no value for prompt, chosen, rejected; the record has no field"),
    "no chosen": Bad(good(9, chosen=None), "missing_field", "no value for chosen; the record has the fields prompt"),
    "chosen is null": Bad(null("chosen"), "missing_field", "no value for chosen"),
    "all is null": Bad(null("prompt", "chosen", "rejected"), "missing_field", "no value for prompt, chosen, rejected"),
    "prompt is null": Bad(null("prompt"), "missing_field", "no prompt"),
    "no prompt and texts": Bad(good(9, prompt=None), "missing_field", "no prompt, and texts without turns"),
    "two columns could be the prompt": Bad(
        good(9, prompt=None, question="a", input="b"), "missing_field", "question and input could each be it"
    ),
    "another format": Bad(vote(1), "missing_field", "no value for chosen, rejected; the record has the fields prompt"),
    "one answer, labelled": Bad(
        {"prompt": "a", "completion": "b", "label": True}, "missing_field", "no value for chosen"
    ),
    "prompt is a number": Bad(good(9, prompt=3), "wrong_type", "prompt is a number, expected text or a list"),
    "prompt is an object": Bad(good(9, prompt={"text": "a"}), "wrong_type", "has the role null"),
    "chosen is a boolean": Bad(good(9, chosen=True), "wrong_type", "chosen is a boolean"),
    "nulls in a list": Bad(good(9, prompt=[None]), "wrong_type", "a message of prompt is null"),
    "nulls in a message": Bad(
        good(9, prompt=[{"role": None, "content": None}]), "wrong_type", "a message of prompt has the role null"
    ),
    "content is null": Bad(
        good(9, prompt=[{"role": "user", "content": None}]), "wrong_type", "no text content and no tool call"
    ),
    "content is a number": Bad(
        good(9, prompt=[{"role": "user", "content": 3}]), "wrong_type", "content of a message of prompt is a number"
    ),
    "misspelt role": Bad(good(9, prompt=talk("usr: cat")), "wrong_type", "the role 'usr', expected system, user"),
    "image": Bad(
        good(9, prompt=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]), "not_text", "type image"
    ),
    "tools that are no JSON": Bad(good(9, tools="[{"), "wrong_type", "tools is text that is no JSON"),
    "tools that are no list": Bad(good(9, tools="{}"), "wrong_type", "tools is an object, expected a list"),
    "score is a word": Bad(
        good(9, score_chosen="good", score_rejected=1),
        "wrong_type",
        "score_chosen is the text 'good', expected a number",
    ),
    "score is a boolean": Bad(
        good(9, score_chosen=True, score_rejected=1), "wrong_type", "score_chosen is a boolean, expected a number"
    ),
    "score is NaN": Bad(good(9, margin=float("nan")), "wrong_type", "margin is no finite number"),
    "score is infinite": Bad(good(9, margin=float("inf")), "wrong_type", "margin is no finite number"),
    "score is 1e999": Bad(lines(good(9)).strip().replace(b"2", b"1e999"), "wrong_type", "margin is no finite number"),
    "share above 1": Bad(good(9, agreement=80), "wrong_type", "agreement is 80, expected a share from 0 to 1"),
    "group is missing": Bad(good(9, meta=None), "missing_field", "no value for meta.film", {"group_key": "meta.film"}),
    "group is null": Bad(
        good(9, meta={"film": None}), "missing_field", "no value for meta.film", {"group_key": "meta.film"}
    ),
    "group is a list": Bad(
        good(9, meta={"film": [1]}),
        "wrong_type",
        "meta.film is a list, expected text or a number",
        {"group_key": "meta.film"},
    ),
    # content
    "empty prompt": Bad(good(9, prompt=""), "empty_prompt"),
    "invisible prompt": Bad(good(9, prompt=ZERO_WIDTH), "empty_prompt"),
    "no turn": Bad(good(9, prompt=[], chosen=[], rejected=[]), "empty_answer", "chosen has no turn"),
    "empty answer": Bad(good(9, chosen=""), "empty_answer", "chosen"),
    "white space as answer": Bad(good(9, rejected=" \n\t"), "empty_answer", "rejected"),
    "invisible answer": Bad(good(9, rejected=ZERO_WIDTH), "empty_answer", "rejected"),
    "identical answers": Bad(good(9, rejected="kind"), "identical_answers"),
    "roles out of order": Bad(
        good(9, prompt=talk("assistant: a", "assistant: b", "user: c")), "roles_out_of_order", "turns 1 and 2 are both"
    ),
    "system in the middle": Bad(
        good(9, prompt=talk("user: a", "system: b", "user: c")), "roles_out_of_order", "turn 2 is the system's"
    ),
    "a tool's turn without a call": Bad(
        good(9, prompt=talk("user: a", "tool: b")), "roles_out_of_order", "turn 2 is a tool's, and no tool call"
    ),
    "prompt ends with the assistant": Bad(
        good(9, prompt=talk("user: a", "assistant: b")), "roles_out_of_order", "last turn is the assistant's"
    ),
    "answer of two turns": Bad(
        good(9, chosen=talk("assistant: a", "assistant: b")), "roles_out_of_order", "chosen is more than one turn"
    ),
    "answer ends with the user": Bad(
        good(9, chosen=talk("user: a", "assistant: b", "user: c")), "last_turn_not_assistant", "chosen ends with"
    ),
    "answers to two prompts": Bad(
        good(9, prompt=None, chosen=talk("user: a", "assistant: b"), rejected=talk("user: c", "assistant: d")),
        "prompt_differs",
        "chosen and rejected part before their last turn",
    ),
    # preference
    "chosen scored lower": Bad(
        good(9, margin=None, score_chosen="1", score_rejected="3"), "chosen_scored_lower", "by 2"
    ),
    "strength unknown": Bad(
        good(9, margin=None), "missing_field", "strength is unknown: name its column", {"min_strength": 1.0}
    ),
    "misspelt column": Bad(
        {"promt": "a", "chosen": "b", "rejected": "c"},
        "missing_field",
        "did you mean promt?; the record has the fields promt, chosen, rejected",
    ),
    "strength too small": Bad(good(9, margin=0.5), "below_min_strength", "0.5, at least 1", {"min_strength": 1.0}),
    # tokens
    "end token inside an answer": Bad(good(9, chosen="kind<|im_end|>and"), "end_token_in_answer", "chosen spells"),
    "prompt too long": Bad(good(9, prompt=LONG * 5), "prompt_too_long", "tokens, at most 64"),
    "answer too long": Bad(
        good(9, chosen=LONG), "answer_too_long", "chosen: ", {"answer_truncation": "drop", "max_answer_tokens": 8}
    ),
    "identical after truncation": Bad(
        good(9, chosen=LONG + "a", rejected=LONG + "b"),
        "identical_after_truncation",
        "8 tokens",
        {"max_answer_tokens": 8},
    ),
    # the other records
    "duplicate": Bad(good(1), "duplicate", "of a.jsonl line 1"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_costs_itself_alone(config: RunConfig, tmp_path: Path, name: str) -> None:
    """Its neighbours are used; its rejection names reason, line and what was found."""
    case = BAD_RECORDS[name]
    write(tmp_path, {"a.jsonl": A + case.content + B})

    counts, rejected = prepared(config, tmp_path, path=str(tmp_path / "a.jsonl"), **case.options)

    assert [(row["source"], row["line"], row["reason"]) for row in rejected] == [("a.jsonl", 2, case.reason)]
    assert (counts["used"], counts["pairs/train"], counts[f"rejected/{case.reason}"]) == (2, 2, 1)
    detail = rejected[0]["detail"]
    assert case.detail in detail
    assert not JARGON.search(detail), detail
    assert "\n" not in detail
