"""Overlap with evaluation prompts, and the file that they come from."""

from __future__ import annotations

import gzip
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.data.ngrams import Overlap, read_prompts
from dpo_train.data.pairs import Message, PreferencePair
from dpo_train.errors import DataError


def _pair(*turns: str, answer: str = "yes") -> PreferencePair:
    roles = ("user", "assistant")
    prompt = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return PreferencePair(prompt, Message("assistant", answer), Message("assistant", "no"), group="")


def test_shared_ngram_is_found_whatever_the_case_and_the_signs() -> None:
    """Three words in a row; the first of those found is named."""
    overlap = Overlap(["The quick, brown fox_jumps!"], 3)
    assert overlap.overlaps(_pair("see the QUICK\nbrown fox jumps")) == "the quick brown"
    assert overlap.overlaps(_pair("brown fox jumps high")) == "brown fox jumps"
    assert overlap.overlaps(_pair("the quick fox; brown jumps")) is None


def test_order_and_place_of_words_count() -> None:
    """The same words in another order are another n-gram."""
    overlap = Overlap(["a b c"], 3)
    assert [overlap.overlaps(_pair(text)) for text in ("a b c", "b a c", "c b a", "a c b", "a a b c")] == [
        "a b c", None, None, None, "a b c",
    ]  # fmt: skip


def test_words_of_all_scripts_count() -> None:
    """Letters and digits of Unicode, case folded: the German sharp s is ss."""
    overlap = Overlap(["GROSSE Straße 12 Привет"], 4)
    assert overlap.overlaps(_pair("große STRASSE 12, привет")) == "grosse strasse 12 привет"


def test_short_prompt_overlaps_only_as_a_whole() -> None:
    """Fewer words than n: every pair that greets would go otherwise."""
    overlap = Overlap(["Hello there!", "???"], 3)
    assert overlap.overlaps(_pair("hello there")) == "hello there"
    assert overlap.overlaps(_pair("Hello there, friend of mine")) is None
    assert overlap.overlaps(_pair(" ??? ")) == "???"
    assert overlap.overlaps(_pair("!")) is None


def test_user_turns_alone_are_compared() -> None:
    """Not the assistant's, not the answers, and no n-gram spans two turns."""
    overlap = Overlap(["a b c"], 3)
    assert overlap.overlaps(_pair("x", "a b c", "y", answer="a b c")) is None
    assert overlap.overlaps(_pair("x", "y", "a b c")) == "a b c"
    assert overlap.overlaps(_pair("a b", "y", "c d")) is None


def test_short_evaluation_prompt_of_several_turns_is_compared_as_one() -> None:
    """Its turns are joined, and so are the pair's."""
    overlap = Overlap(["hi\nwho"], 5)
    assert overlap.overlaps(_pair("Hi", "yes?", "Who?")) == "hi who"
    assert overlap.overlaps(_pair("Hi")) is None


def test_nothing_overlaps_with_nothing() -> None:
    """No prompt, and a pair without a word."""
    assert Overlap([], 2).overlaps(_pair("a b c")) is None
    assert Overlap(["a b c"], 2).overlaps(_pair("...")) is None


@given(prompts=st.lists(st.text("ab ", max_size=8), max_size=4), text=st.text("ab ", max_size=12), n=st.integers(1, 4))
def test_hashes_find_what_a_comparison_of_words_finds(prompts: list[str], text: str, n: int) -> None:
    """Against the plain definition, on few words so that n-grams meet."""
    words = text.split()
    grams = [words[i : i + n] for i in range(len(words) - n + 1)]
    known = [p.split()[i : i + n] for p in prompts for i in range(len(p.split()) - n + 1)]
    expected = next((" ".join(gram) for gram in grams if gram in known), None)
    if len(words) < n and words in [p.split() for p in prompts]:
        expected = " ".join(words) or text.strip()
    assert Overlap(prompts, n).overlaps(_pair(text)) == expected


def test_million_ngrams_are_eight_megabytes() -> None:
    """64 bits each, and nothing beside."""
    overlap = Overlap([" ".join(str(i) for i in range(100_012))], 13)
    assert overlap._grams.nbytes == 100_000 * 8


def test_hashes_are_the_same_in_another_process() -> None:
    """Workers build their own; Python's own hash would differ with its seed."""
    code = "from dpo_train.data.ngrams import Overlap; print(Overlap(['a b c d'], 3)._grams.tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(Overlap(["a b c d"], 3)._grams.tolist())


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("e.jsonl", b'{"prompt": "a b"}\n\n{"prompt": [{"role": "user", "content": "c"}], "id": 3}\n', ["a b", "c"]),
        ("e.txt", b"\xef\xbb\xbffirst line\r\n\r\nsecond\xe2\x80\xa8line", ["first line", "second\u2028line"]),
        ("e.TXT.gz", gzip.compress(b"a\nb, c", mtime=0), ["a", "b, c"]),
        ("e.json", b'[{"prompt": "a"}, {"prompt": "b"}]', ["a", "b"]),
        ("e.json.gz", gzip.compress(b' [\n {\n  "prompt": "a"\n }\n]\n', mtime=0), ["a"]),
        ("e.jsonl", b'[{"prompt": "a"}]', ["a"]),
        ("s3://bucket/e.csv", b'\xef\xbb\xbfid,prompt\r\n1,"a, b\nc"\r\n\r\n2,d\r\n', ["a, b\nc", "d"]),
        ("e.csv", b'prompt\n"[{""role"": ""user"", ""content"": ""a""}]"\n', ["a"]),
        (
            "e.txt",
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
            b' {"from": "human", "value": "c"}]}',
            ["a\nc"],
        ),
    ],
)
def test_prompts_are_read_from_json_csv_and_plain_lines(name: str, content: bytes, prompts: list[str]) -> None:
    """Of messages the user's turns; blank lines, a BOM and CRLF do not matter."""
    assert read_prompts(content, name) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\r\n", "The evaluation prompts in eval.jsonl are empty"),
        (b"\xff\xfe", "cannot be read.*UTF-8"),
        (b'{"prompt": "a"}\n{"question": "b"}', "eval.jsonl, line 2 has no prompt.*question"),
        (b'{"prompt": "a"}\n"b"', "eval.jsonl, line 2 has no prompt"),
        (b'{"prompt": "a"}\n{', "eval.jsonl, line 2 is no JSON"),
        (b'{"prompt": 3}', "eval.jsonl, line 1 has no prompt.*a number"),
        (b'{"prompt": " "}', "eval.jsonl, line 1 has an empty prompt"),
        (b'{"prompt": []}', "eval.jsonl, line 1 has an empty prompt"),
    ],
)
def test_broken_json_lines_name_their_line(content: bytes, message: str) -> None:
    """A prompt that is not compared would look clean."""
    with pytest.raises(DataError, match=message):
        read_prompts(content, "eval.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"a\nb", "line 1 is no JSON"),
        ("e.parquet", b"PAR1", "cannot be read.*the suffix .parquet.*Expected: .jsonl"),
        ("e", b"a", "cannot be read.*no suffix"),
        ("e.txt", b"PAR1\x15\x04\xff", "looks like Parquet"),
        ("e.txt", gzip.compress(b"a", mtime=0), "looks like gzip"),
        ("e.txt", "ab".encode("utf-16-le"), "NUL bytes, as UTF-16"),
        ("e.txt.gz", b"a", "a .gz file that is damaged"),
        ("e.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-3], "a .gz file that is damaged"),
        ("e.txt", b"[INST] a", "is no JSON.*as it begins with"),
        ("e.txt", b"{a}", "line 1 is no JSON"),
        ("e.json", b'{\n "prompt": "a"\n}', "line 1 is no JSON"),
        ("e.json", b'[{"prompt": "a"}, "b"]', 'record 2 has no prompt.*Got: "b"'),
        ("e.json", b"[]", "are empty"),
        ("e.csv", b"id;prompt\n1;a\n", "no column prompt.*the columns id;prompt"),
        ("e.csv", b"prompt,prompt\na,b\n", "two columns prompt"),
        ("e.csv", b"prompt,id\na,1\nb\n", "line 3 is no row of the table.*1 cells"),
        ("e.csv", b"prompt,id\na,1\n,2\n", "line 3 has an empty prompt"),
        ("e.csv", b'prompt\na\n"b\n', "no CSV near line 3"),
        ("e.csv", b"prompt\n", "are empty.*a header alone"),
    ],
)
def test_file_of_another_kind_is_refused(name: str, content: bytes, message: str) -> None:
    """Taken as plain lines it would protect nothing, and say so nowhere."""
    with pytest.raises(DataError, match=message):
        read_prompts(content, name)
