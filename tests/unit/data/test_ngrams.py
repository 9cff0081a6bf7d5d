"""Overlap with evaluation prompts, and the file that they come from."""

from __future__ import annotations

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
    ("content", "prompts"),
    [
        (b'{"prompt": "a b"}\n\n{"prompt": [{"role": "user", "content": "c"}], "id": 3}\n', ["a b", "c"]),
        (b"\xef\xbb\xbffirst line\r\n\r\nsecond\xe2\x80\xa8line", ["first line", "second\u2028line"]),
        (
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
            b' {"from": "human", "value": "c"}]}',
            ["a\nc"],
        ),
    ],
)
def test_prompts_are_json_lines_or_plain_lines(content: bytes, prompts: list[str]) -> None:
    """Of messages the user's turns; blank lines, a BOM and CRLF do not matter."""
    assert read_prompts(content, "eval.jsonl") == prompts


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
def test_broken_file_names_its_line(content: bytes, message: str) -> None:
    """A prompt that is not compared would look clean."""
    with pytest.raises(DataError, match=message):
        read_prompts(content, "eval.jsonl")
