"""Whatever a record holds, it ends as pairs that obey the rules or as rejections with a known reason."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.config import SourceConfig
from dpo_train.data.formats import FORMATS, REASONS, candidates, detect
from dpo_train.data.formats.messages import has_tool_calls
from dpo_train.data.formats.values import is_blank
from dpo_train.data.pairs import PreferencePair
from dpo_train.errors import DataError
from tests.unit.data.records import JSON, RECORD, format_record

SOURCES = st.builds(
    SourceConfig,
    path=st.just("data"),
    pairing=st.sampled_from(["best_worst", "all", "ranking"]),
    min_strength=st.sampled_from([0.0, 1.0]),
    group_key=st.sampled_from([None, "group"]),
    fields=st.sampled_from([None, {"origin": "source"}, {"prompt": "system", "score": "rank"}]),
)
PYTHON = st.sampled_from(
    [b"x", 1j, object(), {1, 2}, float("nan"), 10**5000, Decimal("nan"), datetime(2020, 1, 1), range(2), (), {3: 4}]
)


def _check(record: Any, source: SourceConfig, format: str) -> bool:
    """Checks all outcomes; says whether there was a pair."""
    outcomes = candidates(record, source, format)
    assert outcomes
    pairs = [outcome for outcome in outcomes if isinstance(outcome, PreferencePair)]
    assert pairs or len(outcomes) == 1, "a record that gives no pair is one rejection"
    for outcome in outcomes:
        if not isinstance(outcome, PreferencePair):
            assert outcome.reason in REASONS
            pa.array([outcome.detail], pa.string())
            continue
        assert outcome.prompt[-1].role in ("user", "tool")
        assert outcome.prompt[-1].role == "tool" or not is_blank(outcome.prompt[-1].content)
        assert len(set(outcome.answers)) == len(outcome.answers)
        assert source.pairing == "ranking" or not outcome.others
        for answer in outcome.answers:
            assert answer.role == "assistant"
            assert has_tool_calls(answer) or not is_blank(answer.content)
        assert outcome.strength is None or outcome.strength >= source.min_strength
        assert outcome.agreement is None or 0 <= outcome.agreement <= 1
        turns = (*outcome.prompt, *outcome.answers)
        texts = [outcome.pair_id, outcome.group, outcome.tools, outcome.origin]
        pa.array([*texts, *(text for t in turns for text in (t.role, t.content, t.extra))], pa.string())
    return bool(pairs)


@pytest.mark.parametrize("format", FORMATS)
def test_records_of_a_format_are_used_or_rejected(format: str) -> None:
    """Nearly right records; some of them must become pairs, else the strategy would prove nothing."""
    used = 0

    @given(record=format_record(format), source=SOURCES)
    def check(record: dict[str, Any], source: SourceConfig) -> None:
        nonlocal used
        used += _check(record, source, format)

    check()
    assert used


@given(record=RECORD | JSON | PYTHON | st.dictionaries(st.text(max_size=3), JSON | PYTHON), source=SOURCES)
def test_any_value_is_used_or_rejected_in_every_format(record: Any, source: SourceConfig) -> None:
    """Any JSON and values that only Python has, in every reader."""
    for format in FORMATS:
        _check(record, source, format)


@given(format=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_strange_values_in_the_right_fields_are_rejected(format: str, data: st.DataObject) -> None:
    """Values that only Python has, where a text, a number or a list should stand."""
    record = data.draw(format_record(format))
    for field in data.draw(st.lists(st.sampled_from(sorted(record) or ["x"]), max_size=2)):
        record[field] = data.draw(PYTHON | st.lists(PYTHON, max_size=2))
    _check(record, SourceConfig(path="data"), format)


@given(sample=st.lists(RECORD | JSON | PYTHON, max_size=4))
def test_any_sample_has_a_format_or_an_explanation(sample: list[Any]) -> None:
    """Nothing but a DataError, whose text can be printed."""
    try:
        assert detect(sample) in FORMATS
    except DataError as error:
        str(error).encode()
