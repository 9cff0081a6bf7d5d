"""Which format the records of a source have, and what is said where none fits."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from dpo_train.config import Format, SourceConfig
from dpo_train.data.formats import FORMATS, detect, resolve
from dpo_train.errors import ConfigError, DataError
from tests.unit.data.records import fixture_records

PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
RANKED = {"prompt": "hi", "answers": [{"answer": "yes", "rank": 1}, {"answer": "no", "rank": 2}]}


def test_formats_are_those_that_the_config_takes() -> None:
    """A type has to spell the names out."""
    assert {"auto", *FORMATS} == set(typing.get_args(Format))


def test_majority_of_the_sample_decides() -> None:
    """Two of three records are ranked; what is no object does not vote."""
    assert detect([PAIR, RANKED, "text", None, RANKED]) == "ranking"


def test_equal_counts_are_decided_by_the_order_of_formats() -> None:
    """`pairs` stands before `ranking`, whichever comes first in the data."""
    assert detect([RANKED, PAIR]) == detect([PAIR, RANKED]) == "pairs"


def test_null_columns_do_not_decide() -> None:
    """A column that a union of data sets left null."""
    assert detect([{**RANKED, "chosen": None, "rejected": None}]) == "ranking"


def test_texts_about_humans_are_no_transcripts() -> None:
    """Only a text that begins with a Human: turn is one."""
    assert detect([{"prompt": "Human: who?", "chosen": "Human: me", "rejected": "Human: you"}]) == "pairs"
    assert detect([{"chosen": "He said: Human: x", "rejected": "Human: y"}]) == "pairs"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "a", "completion": "b", "label": True}], "This is unpaired preference data.*method for unpaired"),
        ([{"prompt": [{}], "completion": [{}], "label": False}], "This is unpaired preference data"),
        ([{"messages": [{"role": "user", "content": "x"}], "label": False}], "This is unpaired preference data"),
        (
            [{"question": "a", "answers": ["b", "c"]}],
            "several answers to each prompt.*format: ranking, fields: {prompt",
        ),
        ([{"question": "a", "answers": [{"text": "b", "votes": 1}]}], "several answers.*score: FIELD_OF_AN_ANSWER"),
        ([[{"prompt": "a"}]], "this is a JSON array: name it .json"),
        ([{"Prompt": "a", "Chosen": "b", "Rejected": "c"}], "did you mean .*prompt by 'Prompt'.*fields: {.*: Chosen"),
        ([{"prompt": "a", "choosen": "b", "rejected": "c"}], "did you mean chosen by 'choosen'"),
        ([{"prompt": "a", "completion": "b"}], "supervised fine-tuning: one answer to each prompt"),
        ([{"instruction": "a", "input": "", "output": "b"}], "supervised fine-tuning: one answer to each prompt"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "supervised fine-tuning: conversations or texts"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], "supervised fine-tuning: conversations or texts"),
        ([{"text": "once"}], "supervised fine-tuning: conversations or texts"),
        ([{"prompt": "a"}], "These are prompts alone"),
        ([], "Got: no record"),
        (["a", 3], "Got: 2 records, none of them an object"),
    ],
)
def test_data_without_pairs_is_told_what_it_is(records: list[Any], message: str) -> None:
    """A person learns what the data is and what to do, not only that it does not fit."""
    with pytest.raises(DataError, match=message):
        detect(records)


def test_unknown_columns_are_listed_with_the_formats_and_the_way_out() -> None:
    """The fields found, every format with what it needs, and how to map columns."""
    with pytest.raises(DataError) as caught:
        detect([{"q": "a", "good": "b", "bad\ud800": "c"}])
    message = str(caught.value)
    assert "Got: the fields q, good, bad\\ud800." in message
    assert all(f"{name}: {format.needs}" in message for name, format in FORMATS.items())
    assert "fields: {prompt: YOUR_COLUMN" in message


def test_config_decides_before_the_data() -> None:
    """A named format; with `fields` alone it is `pairs`; else the records decide."""
    sample = fixture_records("nectar")
    assert resolve(SourceConfig(path="d"), sample) == "ranking"
    assert resolve(SourceConfig(path="d", format="pairs"), sample) == "pairs"
    assert resolve(SourceConfig(path="d", fields={"prompt": "q"}), []) == "pairs"


def test_field_that_the_format_does_not_have_is_an_error() -> None:
    """A misspelt target would be a mapping that does nothing."""
    with pytest.raises(ConfigError, match=r"Got: choosen.*Expected: prompt, chosen, rejected"):
        resolve(SourceConfig(path="d", fields={"choosen": "a"}), [])
    assert resolve(SourceConfig(path="d", format="shp", fields={"history": "a", "group": "b"}), []) == "shp"
