"""Strategies for raw records: from well-formed to arbitrary; and the fixtures in the shape of public data sets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

FIXTURES = Path(__file__).parent / "fixtures"


def fixture_records(name: str) -> list[dict[str, Any]]:
    """The records of one fixture file."""
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


# Few letters, so that equal and blank answers turn up; a lone surrogate, which JSON can write and UTF-8 cannot hold.
TEXT = st.text("ab \n\u00e9\U0001f600", max_size=4) | st.text("a\ud800", max_size=2) | st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "pirate"]), "content": TEXT})
FIELD = TEXT | st.lists(MESSAGE, max_size=3) | st.lists(MESSAGE | JSON, max_size=3) | JSON
_STRANGE = st.dictionaries(TEXT, JSON, max_size=2)
_PARTIAL = st.fixed_dictionaries({}, optional={"prompt": FIELD, "chosen": FIELD, "rejected": FIELD, "group": JSON})
_PLAUSIBLE = st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}, optional={"group": JSON})
# Plausible ones are there so that every rule is reached and some records are used.
RECORD = st.builds(lambda fields, strange: {**strange, **fields}, _PLAUSIBLE | _PARTIAL, _STRANGE)

_NUMBER = st.integers(-3, 3) | st.sampled_from(["1", "-2", "0.5", "nan", "", 1.5])
_CALL = st.just([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool"])},
    optional={"content": TEXT | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)},
) | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none() | TEXT, "tool_calls": _CALL | JSON})
_TALK = st.lists(_TURN, max_size=4)
_TRANSCRIPT = st.lists(st.sampled_from(["Human: ", "Assistant: ", "Assistant:"]) | TEXT, max_size=6).map(
    lambda parts: "\n\n" + "\n\n".join(parts)
)
_TEXTUAL = TEXT | _TALK | _TALK.map(json.dumps) | _TRANSCRIPT
_BIT = st.sampled_from([0, 1, "0", "1", 2, None])
_SCORED = st.fixed_dictionaries(
    {},
    optional={"answer": _TEXTUAL, "response": _TEXTUAL, "rank": _NUMBER, "overall_score": _NUMBER, "score": _NUMBER},
)
_COMMON = {"system": TEXT, "tools": JSON, "strength": _NUMBER, "agreement": _NUMBER, "source": JSON, "group": JSON}

_FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "pairs": {"prompt": _TEXTUAL, "chosen": _TEXTUAL, "rejected": _TEXTUAL, "margin": _NUMBER, "score_chosen": _NUMBER},
    "hh": {"prompt": _TRANSCRIPT | st.none(), "chosen": _TRANSCRIPT, "rejected": _TRANSCRIPT},
    "ultrafeedback": {"instruction": _TEXTUAL, "completions": st.lists(_SCORED, max_size=4)},
    "ranking": {"prompt": _TEXTUAL, "answers": st.lists(_SCORED | TEXT, max_size=4), "ranks": st.lists(_NUMBER)},
    "shp": {"history": TEXT, "human_ref_A": TEXT, "human_ref_B": TEXT, "labels": _BIT, "score_A": _NUMBER},
    "tldr": {
        "info": st.fixed_dictionaries({"post": TEXT}, optional={"title": TEXT, "subreddit": TEXT}),
        "summaries": st.lists(st.fixed_dictionaries({"text": TEXT}), min_size=2, max_size=2),
        "choice": _BIT,
    },
    "arena": {
        "prompt": _TEXTUAL,
        "conversation_a": _TALK,
        "conversation_b": _TALK,
        "response_a": _TEXTUAL,
        "response_b": _TEXTUAL,
        "winner": st.sampled_from(["model_a", "model_b", "tie", "x"]) | st.none(),
        "winner_model_a": _BIT,
        "winner_model_b": _BIT,
    },
    "helpsteer": {
        "prompt": _TEXTUAL,
        "response_1": TEXT,
        "response_2": TEXT,
        "preference_strength": _NUMBER,
        "individual_preference": st.lists(st.fixed_dictionaries({"score": _NUMBER}), max_size=3),
    },
}


_SHAPES = {
    "pairs": ("pairs_text", "pairs_conversational", "pairs_implicit", "pairs_tools", "ultrafeedback_binarized"),
    "hh": ("hh", "hh_prompt"),
    "ultrafeedback": ("ultrafeedback",),
    "ranking": ("nectar", "distilabel"),
    "shp": ("shp",),
    "tldr": ("tldr",),
    "arena": ("arena_33k", "arena_55k", "arena_140k", "pku_saferlhf"),
    "helpsteer": ("helpsteer2", "helpsteer3"),
}


@st.composite
def _damaged(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A record of a fixture with up to two values, at any depth, replaced or removed."""
    record: dict[str, Any] = copy.deepcopy(
        draw(st.sampled_from([r for shape in _SHAPES[name] for r in fixture_records(shape)]))
    )
    for _ in range(draw(st.integers(0, 2))):
        place: Any = record
        while isinstance(place, (dict, list)) and place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw(_TEXTUAL | _NUMBER | JSON)
            break
    return record


def format_record(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Records of one format, most of them nearly right: fields left out, or replaced by any JSON."""
    right = _FIELDS[name]
    wrong = {field: strategy | JSON for field, strategy in {**right, **_COMMON}.items()}
    return _damaged(name) | st.fixed_dictionaries(right, optional=_COMMON) | st.fixed_dictionaries({}, optional=wrong)
