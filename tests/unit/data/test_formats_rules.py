"""The rules of records, messages, prompts and pairs, each with its reason."""

from __future__ import annotations

import math
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import dpo_train
from dpo_train.config import SourceConfig
from dpo_train.data.formats import REASONS, candidates
from dpo_train.data.pairs import Message, PreferencePair, Rejection

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
TOOL = {"role": "tool", "content": "12 C"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
GOOD: dict[str, Any] = {"prompt": "hi", "chosen": "yes", "rejected": "no"}


def _read(record: Any, format: str = "pairs", **options: Any) -> PreferencePair | Rejection:
    (outcome,) = candidates(record, SourceConfig(path="data", **options), format)
    return outcome


def _pair(record: Any, format: str = "pairs", **options: Any) -> PreferencePair:
    outcome = _read(record, format, **options)
    assert isinstance(outcome, PreferencePair), outcome
    return outcome


def test_text_prompt_is_one_user_turn() -> None:
    """The simplest record; its group is its prompt."""
    yes, no = Message("assistant", "yes"), Message("assistant", "no")
    assert _read(GOOD) == PreferencePair((Message("user", "hi"),), yes, no, group="user: hi")


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ("text", "not_an_object", "got text"),
        (None, "not_an_object", "got null"),
        ([GOOD], "not_an_object", "got a list"),
        ({}, "missing_field", "no value for prompt, chosen, rejected; the record has no field"),
        (
            {"prompt": "hi", "answer": "x"},
            "missing_field",
            "chosen, rejected; the record has the fields prompt, answer",
        ),
        ({**GOOD, "chosen": None}, "missing_field", "no value for chosen;"),
        (
            {"prompt": "a", "choosen": "b", "rejected": "c"},
            "missing_field",
            "no value for chosen; did you mean choosen?",
        ),
        ({**GOOD, "chosen-rating": "1", "rejected-rating": 3}, "chosen_scored_lower", "by 2"),
        ({**GOOD, "prompt": None}, "missing_field", "texts without turns cannot be told from theirs"),
        (
            {**GOOD, "prompt": None, "input": "a", "instruction": "b"},
            "missing_field",
            "instruction and input could each",
        ),
        ({"chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "x"}]}, "missing_field", "the answer alone"),
        ({**GOOD, "prompt": " \n"}, "empty_prompt", ""),
        ({**GOOD, "prompt": ""}, "empty_prompt", ""),
        ({**GOOD, "prompt": "\ufeff\u200b\u2060"}, "empty_prompt", ""),
        ({**GOOD, "prompt": []}, "empty_prompt", ""),
        ({**GOOD, "prompt": [USER, ASSISTANT, {**USER, "content": " "}]}, "empty_prompt", "turn to be answered"),
        ({**GOOD, "prompt": 3}, "wrong_type", "prompt is a number"),
        ({**GOOD, "prompt": ["hi"]}, "wrong_type", "a message of prompt is text"),
        ({**GOOD, "prompt": [{"role": "pirate", "content": "x"}]}, "wrong_type", "the role 'pirate'"),
        ({**GOOD, "prompt": [{"role": 3, "content": "x"}]}, "wrong_type", "the role a number"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "wrong_type", "no text content and no tool call"),
        (
            {**GOOD, "prompt": [{"role": "user", "content": 3}]},
            "wrong_type",
            "is a number, expected text or a list of parts",
        ),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", "content part"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "not_text", "type image"),
        ({**GOOD, "prompt": [{**CALL, "tool_calls": "f()"}]}, "wrong_type", "tool_calls of prompt is text that is no"),
        ({**GOOD, "prompt": [{**CALL, "tool_calls": [3]}]}, "wrong_type", "expected a list of calls"),
        ({**GOOD, "prompt": [{**USER, "name": date(2020, 1, 1)}]}, "wrong_type", "a value that JSON does not have"),
        ({**GOOD, "prompt": [{**USER, "name": {"x": math.nan}}]}, "wrong_type", "a value that JSON does not have"),
        ({**GOOD, "tools": [{"x": b"bytes"}]}, "wrong_type", "tools holds a value that JSON does not have"),
        ({**GOOD, "tools": 3}, "wrong_type", "tools is a number"),
        ({**GOOD, "tools": "{}"}, "wrong_type", "tools is an object, expected a list"),
        ({**GOOD, "prompt": [USER, ASSISTANT]}, "roles_out_of_order", "last turn is the assistant's"),
        ({**GOOD, "prompt": [SYSTEM]}, "roles_out_of_order", "last turn is the system's"),
        ({**GOOD, "prompt": [USER, SYSTEM, USER]}, "roles_out_of_order", "turn 2 is the system's"),
        ({**GOOD, "prompt": [SYSTEM, SYSTEM, USER]}, "roles_out_of_order", "turn 2 is the system's"),
        ({**GOOD, "prompt": [USER, ASSISTANT, ASSISTANT, USER]}, "roles_out_of_order", "turns 2 and 3 are both"),
        ({**GOOD, "prompt": [USER, TOOL]}, "roles_out_of_order", "turn 2 is a tool's"),
        ({**GOOD, "prompt": [USER, ASSISTANT, TOOL]}, "roles_out_of_order", "turn 3 is a tool's"),
        ({**GOOD, "prompt": [SYSTEM, USER], "system": "be rude"}, "roles_out_of_order", "are different"),
        ({**GOOD, "system": 3}, "wrong_type", "system is a number"),
        ({**GOOD, "chosen": ""}, "empty_answer", "chosen"),
        ({**GOOD, "chosen": "\u200b\ufeff\u00a0\u3164"}, "empty_answer", "chosen"),
        ({**GOOD, "rejected": [{"role": "assistant", "content": " "}]}, "empty_answer", "rejected"),
        ({**GOOD, "rejected": []}, "empty_answer", "rejected has no turn"),
        ({**GOOD, "chosen": 1.5}, "wrong_type", "chosen is a number"),
        ({**GOOD, "chosen": [USER]}, "last_turn_not_assistant", "chosen ends with the user's turn"),
        ({**GOOD, "chosen": [USER, ASSISTANT, USER]}, "last_turn_not_assistant", "chosen"),
        ({**GOOD, "chosen": [CALL, TOOL, ASSISTANT]}, "roles_out_of_order", "chosen is more than one turn"),
        (
            {**GOOD, "chosen": [USER, CALL, TOOL, ASSISTANT], "prompt": [USER]},
            "roles_out_of_order",
            "more than one turn",
        ),
        ({**GOOD, "chosen": [{**USER, "content": "other"}, ASSISTANT]}, "prompt_differs", "chosen does not begin"),
        ({**GOOD, "rejected": "yes"}, "identical_answers", ""),
        ({**GOOD, "chosen": "\ud800"}, "undecodable", "surrogate"),
        ({**GOOD, "prompt": "\udfff"}, "undecodable", "surrogate"),
        ({**GOOD, "prompt": [{**USER, "name": "\udfff"}]}, "undecodable", "surrogate"),
        ({**GOOD, "source": "\udfff"}, "undecodable", "surrogate"),
        ({**GOOD, "strength": -0.5}, "chosen_scored_lower", "by 0.5"),
        ({**GOOD, "margin": "-2"}, "chosen_scored_lower", "by 2"),
        (
            {**GOOD, "score_chosen": 1, "score_rejected": True},
            "wrong_type",
            "score_rejected is a boolean, expected a number",
        ),
        ({**GOOD, "score_chosen": "good", "score_rejected": 1}, "wrong_type", "score_chosen is the text 'good'"),
        ({**GOOD, "score_chosen": math.inf, "score_rejected": 1}, "wrong_type", "no finite number"),
        ({**GOOD, "score_chosen": 10**400, "score_rejected": 1}, "wrong_type", "no finite number"),
        ({**GOOD, "margin": "nan"}, "wrong_type", "margin is the text 'nan'"),
        ({**GOOD, "margin": "1_0"}, "wrong_type", "margin is the text '1_0'"),
        ({**GOOD, "agreement": 1.5}, "wrong_type", "agreement is 1.5, expected a share from 0 to 1"),
    ],
)
def test_unusable_record_is_rejected_with_its_reason(record: Any, reason: str, detail: str) -> None:
    """The reason is a fixed code that can be counted, the detail says what was found."""
    outcome = _read(record)
    assert isinstance(outcome, Rejection)
    assert outcome.reason == reason
    assert detail in outcome.detail


def test_rejection_of_the_reader_passes_through() -> None:
    """An undecodable line keeps its own reason."""
    rejection = Rejection("undecodable", "not UTF-8 JSON")
    assert _read(rejection) is rejection


def test_every_reason_has_its_meaning_and_its_line_in_the_documentation() -> None:
    """A code that the table lacks could not be explained; the package uses no other."""
    package = Path(dpo_train.__file__).parent
    sources = "".join(file.read_text(encoding="utf-8") for file in (package / "data").rglob("*.py"))
    used = set(re.findall(r'(?:Rejection|RejectedError|reject)\(\s*"(\w+)"', sources))
    assert used <= set(REASONS)
    documented = (package.parent / "docs" / "data.md").read_text(encoding="utf-8")
    assert [reason for reason, meaning in REASONS.items() if f"| `{reason}` | {meaning} |" not in documented] == []


def test_detail_about_strange_field_names_can_be_stored() -> None:
    """A field name that UTF-8 cannot hold must not stop the run when the rejection is written to Parquet."""
    outcome = _read({"\ud800" * 300: "x", 3: "y"})
    assert isinstance(outcome, Rejection)
    pa.array([outcome.detail], pa.string())
    assert len(outcome.detail) < 2000


def test_nul_is_kept() -> None:
    """UTF-8, Arrow and tokenizers all hold it, so it is data like any other."""
    pair = _pair({**GOOD, "chosen": "a\x00b"})
    assert pa.array([pair.chosen.content]).to_pylist() == ["a\x00b"]


@pytest.mark.parametrize(
    ("written", "role"), [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("bot", "assistant")]
)
def test_other_names_of_roles_are_understood(written: str, role: str) -> None:
    """Only those that mean one thing everywhere; with ShareGPT's keys too."""
    turns = [{"role": written, "content": "x"}, {"from": "human", "value": "y"}]
    assert [turn.role for turn in _pair({**GOOD, "prompt": turns}).prompt] == [role, "user"]


def test_two_user_turns_in_a_row_are_a_prompt() -> None:
    """People write a second message before the answer comes."""
    assert len(_pair({**GOOD, "prompt": [USER, USER]}).prompt) == 2


def test_tool_results_follow_calls_and_each_other() -> None:
    """Two calls in one turn have two results; the prompt may end with them, even with an empty one."""
    pair = _pair({**GOOD, "prompt": [USER, CALL, TOOL, {**TOOL, "content": ""}]})
    assert [turn.role for turn in pair.prompt] == ["user", "assistant", "tool", "tool"]
    assert pair.prompt[1].content == ""


def test_answer_that_only_calls_a_tool_is_not_empty() -> None:
    """And differs from one that calls another."""
    other = {**CALL, "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}
    pair = _pair({**GOOD, "chosen": [CALL], "rejected": [other]})
    assert (pair.chosen.content, pair.rejected.content) == ("", "")
    assert pair.chosen.extra != pair.rejected.extra


def test_parts_of_text_are_joined() -> None:
    """The multi-modal spelling of a text."""
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    assert _pair({**GOOD, "prompt": [{"role": "user", "content": content}]}).prompt[0].content == "ab"


def test_only_keys_that_templates_read_are_kept() -> None:
    """A time stamp in a message would make two equal prompts differ."""
    turn = {**ASSISTANT, "reasoning_content": "hm", "timestamp": 3, "tool_calls": [], "name": None}
    assert _pair({**GOOD, "chosen": turn}).chosen == Message("assistant", "hello", '{"reasoning_content": "hm"}')


def test_system_column_stands_before_the_prompt_once() -> None:
    """The same system turn in both places is one."""
    assert [t.role for t in _pair({**GOOD, "system": "be kind"}).prompt] == ["system", "user"]
    assert [t.role for t in _pair({**GOOD, "system": "be kind", "prompt": [SYSTEM, USER]}).prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("prompt", "lead", "roles"),
    [
        ("hi", [USER], "u"),
        ("hi ", [USER], "u"),  # some sets strip the prompt column
        ("hi", [SYSTEM, USER], "su"),
        ("hi", [USER, ASSISTANT, {**USER, "content": "bye"}], "uau"),  # its first user turn
        ("hi", [{**USER, "content": "hey"}, ASSISTANT, USER], "uau"),  # its last
        ([USER], [USER], "u"),
        ([SYSTEM, USER], [USER], "su"),
        ([USER], [SYSTEM, USER], "su"),
        (None, [SYSTEM, USER], "su"),
        ([], [SYSTEM, USER], "su"),
        ("hi", [USER, CALL, TOOL], "uat"),
    ],
)
def test_conversations_may_repeat_the_prompt(prompt: Any, lead: list[Any], roles: str) -> None:
    """The conversation is the fuller record: what it tells beyond the prompt column is kept."""
    record = {"prompt": prompt, "chosen": [*lead, ASSISTANT], "rejected": [*lead, {**ASSISTANT, "content": "no"}]}
    pair = _pair(record)
    assert "".join(turn.role[0] for turn in pair.prompt) == roles
    assert (pair.chosen.content, pair.rejected.content) == ("hello", "no")


def test_conversations_with_different_beginnings_have_no_common_prompt() -> None:
    """Each fits the prompt column by itself."""
    outcome = _read({"prompt": "hi", "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [USER, CALL]})
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "prompt_differs"


def test_json_text_is_a_conversation_only_where_both_answers_are() -> None:
    """An answer may well be a list of messages, when that was asked for."""
    spelled = '[{"role": "assistant", "content": "yes"}]'
    assert _pair({**GOOD, "chosen": spelled}).chosen.content == spelled
    pair = _pair({**GOOD, "chosen": spelled, "rejected": spelled.replace("yes", "no")})
    assert (pair.chosen.content, pair.rejected.content) == ("yes", "no")
    assert _pair({**GOOD, "chosen": "[1]", "rejected": "[2]"}).chosen.content == "[1]"
    assert _pair({**GOOD, "prompt": '[{"from": "human", "value": "x"}]'}).prompt == (Message("user", "x"),)


def test_conversation_as_python_prints_it_is_not_trained_on_as_text() -> None:
    """What pandas writes into CSV is no JSON."""
    outcome = _read({**GOOD, "chosen": "[{'role': 'assistant'}]", "rejected": "[{'role': 'assistant'}, 1]"})
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, "as Python prints them" in outcome.detail) == ("wrong_type", True)


@pytest.mark.parametrize(
    ("columns", "strength"),
    [
        ({"score_chosen": 8, "score_rejected": "3.5"}, 4.5),
        ({"chosen_score": 8, "rejected_score": 8}, 0.0),
        ({"chosen_rating": 5, "rejected_rating": None}, None),
        ({"chosen_rating": "", "rejected_rating": ""}, None),
        ({"rating_chosen": Decimal("2.5"), "rating_rejected": 1}, 1.5),
        ({"margin": " 1e1 "}, 10.0),
        ({"strength": 2, "margin": 7}, 2.0),
        ({}, None),
    ],
)
def test_strength_of_pairs_comes_from_their_scores(columns: dict[str, Any], strength: float | None) -> None:
    """The difference, worked by hand; without scores it is unknown, not zero."""
    assert _pair({**GOOD, **columns}).strength == strength


@pytest.mark.parametrize(
    ("value", "group"),
    [("c7", "c7"), (7, "7"), (7.0, "7"), (0, "0"), (0.5, "0.5"), (10**20, "1" + "0" * 20), (Decimal("1.50"), "1.50")],
)
def test_group_is_the_named_field_as_text(value: Any, group: str) -> None:
    """0 groups too, and a whole float is its integer: Parquet makes floats where a row is null."""
    assert _pair({**GOOD, "meta": {"id": value}}, group_key="meta.id").group == group
    assert _pair({**GOOD, "id": value}, fields={"group": "id"}).group == group


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing_field"),
        ("", "missing_field"),
        (True, "wrong_type"),
        (math.nan, "wrong_type"),
        ({}, "wrong_type"),
    ],
)
def test_group_that_groups_nothing_is_a_rejection(value: Any, reason: str) -> None:
    """A record without its group could leak into another split."""
    outcome = _read({**GOOD, "conversation": value}, group_key="conversation")
    assert isinstance(outcome, Rejection)
    assert outcome.reason == reason
    assert "conversation" in outcome.detail


def test_own_columns_by_a_mapping() -> None:
    """Nested objects by dots; a column whose name has the dot wins; what is mapped is not looked for elsewhere."""
    record = {
        "ask": {"text": "hi"},
        "a.b": "yes",
        "a": {"b": "wrong"},
        "worse": "no",
        "prompt": "wrong",
        "by": ["x", "y"],
        "gap": "2",
        "share": 0.75,
    }
    fields = {
        "prompt": "ask.text",
        "chosen": "a.b",
        "rejected": "worse",
        "origin": "by",
        "strength": "gap",
        "agreement": "share",
    }
    pair = _pair(record, fields=fields)
    assert (pair.prompt[0].content, pair.chosen.content, pair.rejected.content) == ("hi", "yes", "no")
    assert (pair.origin, pair.strength, pair.agreement) == ("x, y", 2.0, 0.75)
    outcome = _read({**GOOD, "x": 1}, fields={"chosen": "x.y.z"})
    assert isinstance(outcome, Rejection)
    assert outcome.detail.startswith("no value for x.y.z;")


def test_mapping_serves_every_format() -> None:
    """Two answers with scores under names of their own, read as `shp` reads them: 0.5 - -0.5."""
    record = {
        "question": {"full_text": "Why?", "dataset": "d"},
        "answer_0": "So.",
        "answer_1": "No.",
        "score_0": -0.5,
        "score_1": 0.5,
    }
    fields = {
        "history": "question.full_text",
        "human_ref_A": "answer_0",
        "human_ref_B": "answer_1",
        "score_A": "score_0",
        "score_B": "score_1",
        "origin": "question.dataset",
    }
    pair = _pair(record, "shp", fields=fields)
    assert (pair.chosen.content, pair.rejected.content, pair.strength, pair.origin) == ("No.", "So.", 1.0, "d")
    scored = {"instruction": "q", "completions": [{"response": "a", "s": 1}, {"response": "b", "s": 4}]}
    assert _pair(scored, "ultrafeedback", fields={"score": "s"}).strength == 3.0
    confident = {"info": {"post": "p"}, "summaries": ["a", "b"], "choice": "1", "extra": {"confidence": 8}}
    assert _pair(confident, "tldr", fields={"strength": "extra.confidence"}).strength == 8.0


def test_origin_of_another_kind_is_none() -> None:
    """A column that happens to be called source; one that the user names must be right."""
    assert _pair({**GOOD, "source": {"id": 3}}).origin == ""
    assert isinstance(_read({**GOOD, "s": {"id": 3}}, fields={"origin": "s"}), Rejection)


@pytest.mark.parametrize("vote", ["draw", "", 3])
def test_unknown_vote_is_not_a_tie(vote: Any) -> None:
    """Only votes whose meaning is known count."""
    outcome = _read({"prompt": "q", "response_a": "a", "response_b": "b", "winner": vote}, "arena")
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "wrong_type"


def test_cycles_and_depth_are_rejections() -> None:
    """Values that no file holds, but a caller in Python may."""
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for value in (cycle, deep):
        outcome = _read({**GOOD, "tools": value})
        assert isinstance(outcome, Rejection)
        assert outcome.reason == "wrong_type"
    # Its destruction would recurse as well.
    while isinstance(deep, list):
        deep = deep.pop()
