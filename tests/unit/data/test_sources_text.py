"""JSON and CSV files that are broken, or written in one of the many ways in which people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.data.sources import base, json_stream
from dpo_train.errors import DataError
from tests.unit.data.test_sources import GOOD, outcomes, read

BROKEN_JSON = {
    "no comma": (b'[{"n": 1} {"n": 2}]', 1),
    "bad value": (b'[{"n": 1}, {"n": nope}, {"n": 3}]', 1),
    "cut in a record": (b'[{"n": 1}, {"n": "abc', 1),
    "cut behind a record": (b'[{"n": 1}', 1),
    "cut behind a comma": (b'[{"n": 1},', 1),
    "text behind the array": (b'[{"n": 1}] {"n": 2}', 1),
    "no json": (b"hello", 0),
    "only an opening": (b"[", 0),
    "broken object": (b'{"n": 1} {"n"; 2}', 1),
    "text without an end": (b'[{"n": 1}, {"n": "' + b"a" * 3000, 1),
}


@pytest.mark.parametrize(("content", "before"), BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("window", [1, 2**20])
def test_json_that_breaks_is_an_error_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, before: int, window: int
) -> None:
    """After how many records, at which line and character: how much is lost cannot be told."""
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window)
    monkeypatch.setattr(base, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json is damaged.*after {before} records?, at line 1, character \d+"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("window", [1, 7, 2**20])
def test_json_that_breaks_names_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """The second record begins in line 6 and breaks in line 8, counted by hand; the window does not matter."""
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window)
    (tmp_path / "a.json").write_bytes(b'[\n {\n  "n":\n   1\n },\n {\n  "n": 2,\n  n: 3\n }\n]')
    with pytest.raises(DataError, match=r"after 1 record, at line 8, character 36 .* begins in line 6"):
        read(tmp_path / "a.json")


def test_comma_behind_the_last_record_costs_nothing_else(tmp_path: Path) -> None:
    """What is lost is known: nothing."""
    (tmp_path / "a.json").write_bytes(b'[{"n": 1}, {"n": 2},\n]')
    assert outcomes(read(tmp_path / "a.json")) == [{"n": 1}, {"n": 2}, "undecodable"]


@pytest.mark.parametrize("content", [b"[]", b" [ ] \n", b"\xef\xbb\xbf[]"])
def test_empty_array_gives_no_record(tmp_path: Path, content: bytes) -> None:
    """That there is nothing to train on is said where records are counted."""
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    "bad",
    [
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * 9000 + b"]" * 9000,
    ],
    ids=lambda bad: repr(bad[:12]),
)
def test_undecodable_element_of_an_array_costs_only_itself(tmp_path: Path, bad: bytes) -> None:
    """Where its end is known, the records behind it are read."""
    (tmp_path / "a.json").write_bytes(b'[{"n": 1}, ' + bad + b', {"n": 1}]')
    assert outcomes(read(tmp_path / "a.json")) == [{"n": 1}, "undecodable", {"n": 1}]


@pytest.mark.parametrize("window", [1, 2, 3, 2**20])
def test_values_other_than_objects_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """A number that a window cuts is one number."""
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window)
    (tmp_path / "a.json").write_bytes(b'[1234.5e2, true, null, "\\u00e9", -12, [], {}]')
    assert [value for _, value in read(tmp_path / "a.json")] == [123450.0, True, None, "\u00e9", -12, [], {}]


def test_one_object_in_a_file_is_one_record(tmp_path: Path) -> None:
    """However it is indented."""
    (tmp_path / "a.json").write_text('{\n "n": 1\n}\n')
    assert read(tmp_path / "a.json") == [(1, {"n": 1})]


def test_json_lines_named_json_lose_only_the_broken_line(tmp_path: Path) -> None:
    """The first line tells that every line is a record."""
    (tmp_path / "a.json").write_bytes(GOOD + b"\n{broken\n\n" + GOOD)
    records = read(tmp_path / "a.json")
    assert [(line, outcome) for (line, _), outcome in zip(records, outcomes(records), strict=True)] == [
        (1, {"n": 1}),
        (2, "undecodable"),
        (4, {"n": 1}),
    ]


def test_csv_rows_that_do_not_fit_are_rejections(tmp_path: Path) -> None:
    """Too few cells, too many, text behind a closing quote; blank lines count as lines."""
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,2\r\n\r\n1\r\n1,2,3\r\n"1"x,2\r\n3,4')
    records = read(tmp_path / "a.csv")
    bad = "undecodable"
    assert outcomes(records) == [{"a": "1", "b": "2"}, bad, bad, bad, {"a": "3", "b": "4"}]
    assert [line for line, _ in records] == [2, 4, 5, 6, 7]


@pytest.mark.parametrize("limit", [12, 2**20])
def test_csv_quote_without_an_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """What it swallows cannot be told from a cell, nor where that is more than a record may have."""
    monkeypatch.setattr(base, "MAX_RECORD_BYTES", limit)
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n"3,4\n5,6\n7,8\n')
    with pytest.raises(DataError, match=r"a\.csv is damaged.*row of line 3 a quotation mark .* file's end, line 5"):
        read(tmp_path / "a.csv")


def test_csv_rejection_of_several_lines_names_them(tmp_path: Path) -> None:
    """A quote that the next row's closes."""
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"2\n"3",4\n5,6\n')
    (_, bad), (line, value) = read(tmp_path / "a.csv")
    assert "no row of cells in lines 2 to 3: text behind" in bad.detail
    assert (line, value) == (4, {"a": "5", "b": "6"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\ncaf\xe9,3\n", "is not UTF-8 text: line 3.*byte 0xe9 at position 3.*save it as UTF-8"),
        ("a,b\r\n1,2\r\n".encode("utf-16"), "line 1.*looks like UTF-16.*save it as UTF-8"),
        ("a,b\r\n1,2\r\n".encode("utf-16-le"), "line 1.*as UTF-16 has them.*save it as UTF-8"),
        ("a,b\r\n1,2\r\n".encode("utf-16-be"), "line 1.*as UTF-16 has them.*save it as UTF-8"),
        (b"a,b\r1,2\r", "no CSV header: a carriage return"),
    ],
)
def test_csv_in_another_encoding_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Row by row, all records with accents would be lost and no others."""
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt;chosen;rejected\n1;2;3\n", "divided by ';'"),
        (b"prompt\tchosen\n", "divided by '\\\\t'"),
        (b"\n1,2\n", "no header"),
        (b"a,b,a\n", "two columns of one name.*'a'"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
        (b'"a"x,b\n', "no CSV header"),
    ],
)
def test_csv_without_a_usable_header_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    """Every row would be wrong in the same way."""
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")
