"""A raw record becomes a pair or a rejection with its reason."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given

from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.validate import validate
from tests.unit.data.records import RECORD

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
GOOD = {"prompt": "hi", "chosen": "yes", "rejected": "no"}


def test_text_prompt_is_one_user_turn() -> None:
    """The simplest record; its group is its prompt."""
    assert validate(GOOD) == PreferencePair((Message("user", "hi"),), "yes", "no", group="user: hi")


def test_conversation_and_message_answers_are_read() -> None:
    """The format in which answers are lists with one assistant turn; other fields are ignored."""
    record = {
        "prompt": [{"role": "system", "content": "be kind"}, USER, ASSISTANT, USER],
        "chosen": [{"role": "assistant", "content": "yes", "weight": 3}],
        "rejected": "no",
        "score": 4,
    }
    pair = validate(record)
    assert isinstance(pair, PreferencePair)
    assert [m.role for m in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.chosen, pair.rejected) == ("yes", "no")


@pytest.mark.parametrize(("value", "group"), [("c7", "c7"), (7, "7"), (0, "0"), (["a"], "['a']")])
def test_group_is_the_named_field_as_text(value: Any, group: str) -> None:
    """Any value groups, 0 included."""
    pair = validate({**GOOD, "conversation": value}, "conversation")
    assert isinstance(pair, PreferencePair)
    assert pair.group == group


def test_answers_keep_their_white_space() -> None:
    """Nothing is stripped: the model is trained on what stands there."""
    pair = validate({**GOOD, "chosen": " yes\n"})
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == " yes\n"


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ("text", "not_an_object", "got str"),
        (None, "not_an_object", "got NoneType"),
        ([GOOD], "not_an_object", "got list"),
        ({"prompt": "hi", "answer": "x"}, "missing_field", "no chosen, rejected; the record has prompt, answer"),
        ({**GOOD, "chosen": None}, "missing_field", "no chosen;"),
        ({**GOOD, "prompt": " \n"}, "empty_prompt", ""),
        ({**GOOD, "prompt": []}, "empty_prompt", ""),
        ({**GOOD, "prompt": 3}, "wrong_type", "prompt is int"),
        ({**GOOD, "prompt": {"role": "user"}}, "wrong_type", "prompt is dict"),
        ({**GOOD, "prompt": ["hi"]}, "wrong_type", "a message of prompt"),
        ({**GOOD, "prompt": [{"role": "pirate", "content": "x"}]}, "wrong_type", "system, user, assistant, tool"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "wrong_type", "text content"),
        ({**GOOD, "prompt": [USER, ASSISTANT]}, "roles_out_of_order", "last turn is the assistant's"),
        ({**GOOD, "chosen": ""}, "empty_answer", "chosen"),
        ({**GOOD, "rejected": [{"role": "assistant", "content": " "}]}, "empty_answer", "rejected"),
        ({**GOOD, "chosen": 1.5}, "wrong_type", "chosen is float"),
        ({**GOOD, "chosen": [USER]}, "roles_out_of_order", "chosen is not exactly one assistant turn"),
        ({**GOOD, "chosen": [ASSISTANT, USER]}, "roles_out_of_order", "chosen"),
        ({**GOOD, "rejected": []}, "roles_out_of_order", "rejected"),
        ({**GOOD, "rejected": "yes"}, "identical_answers", ""),
        ({**GOOD, "chosen": "\ud800"}, "undecodable", "surrogate"),
        ({**GOOD, "prompt": "\udfff"}, "undecodable", "surrogate"),
    ],
)
def test_unusable_record_is_rejected_with_its_reason(record: Any, reason: str, detail: str) -> None:
    """The reason is a fixed code that can be counted, the detail says what was found."""
    outcome = validate(record)
    assert isinstance(outcome, Rejection)
    assert outcome.reason == reason
    assert detail in outcome.detail


def test_missing_group_is_a_rejection() -> None:
    """A record without the field that keeps conversations together could leak into another split."""
    outcome = validate(GOOD, "conversation")
    assert isinstance(outcome, Rejection)
    assert outcome.detail.startswith("no conversation;")


def test_rejection_of_the_reader_passes_through() -> None:
    """An undecodable line keeps its own reason."""
    rejection = Rejection("undecodable", "not UTF-8 JSON")
    assert validate(rejection) is rejection


def test_detail_about_strange_field_names_can_be_stored() -> None:
    """A field name that UTF-8 cannot hold must not stop the run when the rejection is written to Parquet."""
    outcome = validate({"\ud800": "x"})
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "missing_field"
    pa.array([outcome.detail], pa.string())


@given(record=RECORD)
def test_pairs_satisfy_what_the_rejections_promise(record: dict[str, Any]) -> None:
    """Whatever passes has a prompt that does not end with the assistant and two different answers with text."""
    outcome = validate(record)
    if isinstance(outcome, PreferencePair):
        assert outcome.prompt
        assert outcome.prompt[-1].role != "assistant"
        assert outcome.chosen.strip()
        assert outcome.rejected.strip()
        assert outcome.chosen != outcome.rejected
