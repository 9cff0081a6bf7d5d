"""Records in the shape of public data sets to the pairs that they mean, worked by hand."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.config import SourceConfig
from dpo_train.data.formats import candidates, detect
from dpo_train.data.pairs import Message, PreferencePair, Rejection
from tests.unit.data.records import FIXTURES, fixture_records

SOURCE = SourceConfig(path="data")

Short = tuple[Any, ...] | str


def _short(outcome: PreferencePair | Rejection) -> Short:
    """A pair as (prompt, chosen, rejected, strength, agreement, origin); a rejection as its reason."""
    if isinstance(outcome, Rejection):
        return outcome.reason
    prompt = " / ".join(f"{turn.role[0]}:{turn.content}" for turn in outcome.prompt)
    return prompt, outcome.chosen.content, outcome.rejected.content, outcome.strength, outcome.agreement, outcome.origin


def _read(name: str, source: SourceConfig = SOURCE) -> list[list[Short]]:
    records = fixture_records(name)
    return [[_short(outcome) for outcome in candidates(record, source, detect(records))] for record in records]


def _one(*values: Any) -> Short:
    """A pair with the last fields left out."""
    return (*values, *(None, None, "")[len(values) - 3 :])


EXPECTED: dict[str, tuple[str, list[Short]]] = {
    "pairs_text": (
        "pairs",
        [
            _one("u:Name a red fruit.", "A cherry.", "A lemon."),
            _one("u:Say good night.", " Good night, sleep well.\n", "No."),  # white space stays
            "identical_answers",
            "empty_answer",  # a zero-width space and a BOM
        ],
    ),
    "pairs_orca": (
        "pairs",
        [
            _one("s:You answer in one word. / u:Which planet has rings?", "Saturn", "Mars"),
            _one("u:What do bees make?", "Honey.", "Milk."),  # an empty system column is none
            "empty_prompt",
        ],
    ),
    "pairs_conversational": (
        "pairs",
        [
            _one("u:What colour is grass?", "Green.", "Blue."),
            _one("s:Be short. / u:Hi / a:Hello. / u:How many legs has an ant?", "Six.", "Eight."),
            "roles_out_of_order",
        ],
    ),
    "pairs_implicit": (
        "pairs",
        [
            _one("u:What colour is snow?", "White.", "Black."),
            _one("u:Hi / a:Hello. / u:Bye", "See you.", "Go."),
            "prompt_differs",
            "last_turn_not_assistant",
        ],
    ),
    "pairs_tools": (
        "pairs",
        [
            _one("u:Weather in Oslo? / a: / t:-3 C, snow", "It snows at -3 C.", "It is warm."),
            _one("u:Weather in Oslo?", "", "I cannot know."),  # the chosen answer is a tool call
            "roles_out_of_order",
            "wrong_type",
        ],
    ),
    "pairs_sharegpt": (
        "pairs",
        [
            _one("s:Be kind. / u:I lost my keys.", "I am sorry. Where did you see them last?", "Your fault."),
            _one("u:Hi / a:Hello. / u:Sing.", "La la la.", "I will not."),
            "wrong_type",
        ],
    ),
    "ultrafeedback_binarized": (
        "pairs",
        [
            _one("u:List two metals.", "Iron and tin.", "Wood.", 5.5),  # 8.5 - 3
            _one("u:Rhyme with cat.", "Hat.", "Mat.", 0.0),
            "chosen_scored_lower",
        ],
    ),
    "argilla": (
        "pairs",
        [
            ("u:Translate to French: cat", "chat", "chien", 3.0, None, "flan"),  # 5 - 2
            ("u:Translate to French: dog", "chien", "chat", None, None, "flan"),
            "prompt_differs",
        ],
    ),
    "hh": (
        "hh",
        [
            _one("u:How do I boil an egg?", "Ten minutes in boiling water.", "I do not know."),
            _one("u:Hi / a:Hello! How can I help? / u:Name a river.\n\nIn Europe.", "The Danube.", "The Amazon."),
            _one("u:Wait / u:I meant lakes.", "Lake Garda.", "What?"),
            "prompt_differs",
            "last_turn_not_assistant",
            "empty_answer",
        ],
    ),
    "hh_prompt": (
        "hh",
        [
            _one("u:Name a bird.", " A robin.", " A shark."),
            _one("u:Hi / a:Hello. / u:Name a fish.", " A trout.", " A robin."),
            "identical_answers",
        ],
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [
            # 8.5 (the first of two) against 1
            ("u:Define a verb.", "A word for an action.", "A noun.", 7.5, None, "evol_instruct"),
            # ratings 5, 4, 3 without the N/A against 1, 2: 4 - 1.5
            ("u:Greet me.", "Hello!", "What.", 2.5, None, "sharegpt"),
            "too_few_answers",  # one is empty, one has no overall score
            "tie",
        ],
    ),
    "nectar": (
        "ranking",
        [
            ("u:Name a tree.", "An oak.", "A rose.", 2.0, None, "lmsys-chat-1m, flan"),  # rank 1 against 3
            ("u:Hi / a:Hello. / u:Name a stone.", "Granite.", "Butter.", 2.0, None, "sharegpt"),
            "too_few_answers",
        ],
    ),
    "distilabel": (
        "ranking",
        [
            _one("u:Count to three.", "1 2 3", "1 3", 4.0),  # rated 5 against 1
            "tie",
            "wrong_type",  # two answers, one rating
        ],
    ),
    "shp": (
        "shp",
        [
            ("u:Why does bread rise?", "Yeast makes gas.", "Magic.", 3.0, None, "askculinary_train"),
            ("u:Why is jam sweet?", "Sugar, mostly.", "Dunno.", 4.5, None, "askculinary_train"),
            "chosen_scored_lower",  # the label says A, which has 4 points against 18
            "empty_answer",
        ],
    ),
    "tldr": (
        "tldr",
        [
            (
                "u:SUBREDDIT: r/Pets\n\nTITLE: Dog and shoe\n\nPOST: My dog ate my shoe.\nWhat now?\n\nTL;DR:",
                " Dog ate shoe, asks for help.",
                " Shoes are nice.",
                None,
                None,
                "Pets",
            ),
            (
                "u:SUBREDDIT: r/Pets\n\nTITLE: Dog and shoe\n\nPOST: My dog ate my shoe.\nWhat now?\n\nTL;DR:",
                " Dog ate a shoe, what now?",
                " Shoes.",
                None,
                None,
                "Pets",
            ),
            (
                "u:TITLE: Bridge closed\n\nARTICLE: The bridge was closed on Monday.\n\nTL;DR:",
                "Bridge closed.",
                "Bridge open.",
                None,
                None,
                "daily",
            ),
            "wrong_type",
            "missing_field",
        ],
    ),
    "arena_33k": (
        "arena",
        [
            _one("u:What is a prime?", "A number with two divisors.", "A steak."),
            _one("u:Largest ocean?", "Pacific.", "Atlantic."),
            "tie",
            "tie",
            "prompt_differs",  # the models' first answers differ, so their second ones answer different conversations
        ],
    ),
    "arena_140k": (
        "arena",
        [
            _one("u:Name a prime.", "7", "8"),
            _one("u:Name an even number.", "8", "7"),
            "tie",
            "not_text",
        ],
    ),
    "arena_55k": (
        "arena",
        [
            _one("u:Name a cheese.", "Brie.", "Bread."),
            _one("u:Name a wine.", "Rioja.", "Milk."),
            "tie",
            "prompt_differs",
            "wrong_type",
        ],
    ),
    "pku_saferlhf": (
        "arena",
        [
            _one("u:How do I stay awake?", "Take walks, drink water.", "Never sleep."),
            _one("u:How do I relax?", "Read a book.", "Stop."),
            "identical_answers",
        ],
    ),
    "helpsteer2": (
        "helpsteer",
        [
            _one("u:c#", "A language.", "A note.", 2.0, 0.75),  # 2, 1 and 3 of 2, 1, -1, 3 say the second
            # -100 says that neither can be used: two of three agree
            ("u:Hi / a:Hello. / u:Name a sea.", "The Baltic.", "A desert.", 3.0, pytest.approx(2 / 3), ""),
            "tie",
            "missing_field",
        ],
    ),
    "helpsteer3": (
        "helpsteer",
        [
            ("u:Name a moon. / a:Europa. / u:Another.", "Titan.", "Venus.", 2.0, pytest.approx(2 / 3), "general"),
            ("u:Name a comet.", "Halley's.", "The sun.", 1.0, 0.5, "general"),
            "tie",
            "roles_out_of_order",
        ],
    ),
}


def test_every_fixture_has_its_expectation() -> None:
    """A file that no one compares would prove nothing."""
    assert {file.stem for file in FIXTURES.glob("*.jsonl")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_public_shape_is_recognised_and_read(name: str) -> None:
    """The format is recognised by itself, and each record gives what was worked out by hand."""
    format, expected = EXPECTED[name]
    assert detect(fixture_records(name)) == format
    # Of a ranked record with a broken answer this is the pair; the rejection beside it has a test of its own.
    assert [outcomes[0] for outcomes in _read(name)] == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_record_reads_the_same_through_parquet(name: str) -> None:
    """Arrow adds a null wherever another row has a key: of messages, tool calls, info and ratings."""
    records = [r for r in fixture_records(name) if not isinstance(r.get("tools"), list)]  # text or list, not both
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    format = detect(records)
    for record, row in zip(records, pq.read_table(buffer).to_pylist(), strict=True):
        assert candidates(row, SOURCE, format) == candidates(record, SOURCE, format)


@pytest.mark.parametrize("name", EXPECTED)
def test_record_reads_the_same_as_csv_text(name: str) -> None:
    """CSV holds numbers as text, null as nothing, and lists and objects as JSON text."""
    format = EXPECTED[name][0]
    for record in fixture_records(name):
        cells = {
            key: value if isinstance(value, str) else "" if value is None else json.dumps(value)
            for key, value in record.items()
        }
        read, expected = (list(map(_short, candidates(r, SOURCE, format))) for r in (cells, record))
        # All but the origin, where a list in text is as good a name as any other.
        assert [item if isinstance(item, str) else item[:5] for item in read] == [
            item if isinstance(item, str) else item[:5] for item in expected
        ]


def test_ranked_record_gives_a_rejection_for_each_answer_that_cannot_be_used() -> None:
    """Nectar's second record has an empty answer between two good ones."""
    assert [type(item).__name__ for item in candidates(fixture_records("nectar")[1], SOURCE, "ranking")] == [
        "PreferencePair",
        "Rejection",
    ]
    assert _read("nectar")[1][1] == "empty_answer"


def test_of_equally_bad_answers_the_first_is_the_worst() -> None:
    """As of equally good ones the first is the best: the pair must not depend on how a sort breaks ties."""
    record = {"prompt": "q", "answers": ["a", "b", "c", "d"], "scores": [1, 5, 1, 5]}
    (pair,) = candidates(record, SOURCE, "ranking")
    assert _short(pair) == _one("u:q", "b", "a", 4.0)


def test_turn_of_a_transcript_begins_with_its_mark_alone() -> None:
    """A line about `Human:x`, or one that does not follow an empty line, is part of the turn that it stands in."""
    lead = "\n\nHuman: Explain.\n\nHuman:x\nAssistant: y\n\nAssistant: "
    (pair,) = candidates({"chosen": lead + "a", "rejected": lead + "b"}, SOURCE, "hh")
    assert _short(pair) == _one("u:Explain.\n\nHuman:x\nAssistant: y", "a", "b")


def test_all_pairs_of_a_ranking() -> None:
    """Ranks 1, 3, 2: the first over both others, the second over the third, best first."""
    pairs = _read("nectar", SourceConfig(path="data", pairing="all"))[0]
    assert [pair[1:4] for pair in pairs] == [
        ("An oak.", "A fir tree.", 1.0),
        ("An oak.", "A rose.", 2.0),
        ("A fir tree.", "A rose.", 1.0),
    ]


def test_all_pairs_leave_out_answers_of_the_same_score() -> None:
    """Scores 4, 8.5, 1, 8.5: six couples, one of them equal."""
    pairs = _read("ultrafeedback", SourceConfig(path="data", pairing="all"))[0]
    assert [pair[3] for pair in pairs] == [4.5, 7.5, 4.5, 7.5, 3.0]


def test_min_strength_rejects_the_weaker_pairs_of_a_ranking() -> None:
    """Of the differences 4.5, 7.5, 4.5, 7.5 and 3 two reach 5; where none does, the record is one rejection."""
    outcomes = _read("ultrafeedback", SourceConfig(path="data", pairing="all", min_strength=5.0))[0]
    assert [item if isinstance(item, str) else item[3] for item in outcomes] == [
        "below_min_strength",
        7.5,
        "below_min_strength",
        7.5,
        "below_min_strength",
    ]
    assert _read("ultrafeedback", SourceConfig(path="data", pairing="all", min_strength=9.0))[0] == [
        "below_min_strength"
    ]


def test_min_strength_of_pairs_without_one_is_a_missing_field() -> None:
    """A vote says nothing of strength; keeping it would be a guess, so would dropping it as weak."""
    assert _read("arena_33k", SourceConfig(path="data", min_strength=1.0))[0] == ["missing_field"]
    assert _read("shp", SourceConfig(path="data", min_strength=3.0))[:2] == [
        [EXPECTED["shp"][1][0]],  # exactly 3 is enough
        [EXPECTED["shp"][1][1]],
    ]
    assert _read("shp", SourceConfig(path="data", min_strength=4.0))[0] == ["below_min_strength"]


def test_tool_calls_and_tools_are_kept_for_the_template() -> None:
    """Nulls that Arrow adds are dropped; keys keep their order, which a template prints."""
    pair = candidates(fixture_records("pairs_tools")[0], SOURCE, "pairs")[0]
    assert isinstance(pair, PreferencePair)
    call = '{"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}]}'
    assert pair.prompt[1] == Message("assistant", "", call)
    assert pair.prompt[2] == Message("tool", "-3 C, snow", '{"name": "weather"}')
    assert pair.tools.startswith('[{"type": "function", "function": {"name": "weather", "description": ')
    same = candidates(fixture_records("pairs_tools")[1], SOURCE, "pairs")[0]
    assert isinstance(same, PreferencePair)
    assert same.tools == pair.tools  # a list, and the same as JSON text
    assert same.chosen == Message("assistant", "", call)
