"""The model card: what it says, and what it must not let data say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train.registry import Card, card_text, find_licence, licence_files
from tests.mlflow.made import findings


def card(**changes: Any) -> Card:
    report = {
        "findings": dataclasses.asdict(findings()),
        "verdict": {"rules": [{"rule": "accuracy", "limit": "above 0.5", "outcome": "passed"}]},
    }
    plain = Card(
        name="helper", base_model="org/base", licence="apache-2.0", data={"pairs.jsonl": "d1g3st"},
        counts={"records": 200, "kept_pairs": 190}, training={"loss": "sigmoid", "epochs": 2}, beta=0.1,
        report=report, chat=True, identity={"policy": "p0l1cy"},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_front_matter_is_what_the_hub_reads() -> None:
    """A licence that is no identifier becomes "other"; a base that is no hub name is left to the text."""
    assert front_matter(card_text(card())) == {
        "license": "apache-2.0", "tags": ["dpo"], "library_name": "transformers", "base_model": "org/base",
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    other = card_text(card(base_model="my model", licence="Llama Community Licence: ask first"))
    assert front_matter(other)["license"] == "other"
    assert "base_model" not in front_matter(other)
    assert "- Licence of the base model: Llama Community Licence: ask first" in other


def test_every_number_has_its_interval_and_n() -> None:
    """Data by digest and count, beta and loss, accuracy and margin, the gate."""
    text = card_text(card())
    for line in (
        "| pairs.jsonl | `d1g3st` |", "| records | 200 |", "| beta | `0.1` |", '| loss | `"sigmoid"` |',
        "| accuracy, held-out | 0.900 (0.800 to 0.950, n = 60) |", "| accuracy | above 0.5 | passed |",
        "- Digest of the policy: `p0l1cy`",
    ):  # fmt: skip
        assert line in text.splitlines()


def test_number_that_could_not_be_measured_is_no_number() -> None:
    """report.json has null for what is not finite."""
    one = card()
    one.report["findings"]["heldout"]["margin"] |= {"low": None}
    assert "| reward margin, held-out | 0.300 (not measurable to 0.400, n = 60) |" in card_text(one).splitlines()


def test_names_from_data_are_text() -> None:
    """A name with pipes, tags and line ends opens no column, no tag and no heading."""
    text = card_text(card(data={"a|b\n# <script>": "d"}))
    assert r"| a\|b \# \<script\> | `d` |" in text.splitlines()


def test_bar_in_an_option_opens_no_column() -> None:
    """Also inside of code it would end its cell."""
    text = card_text(card(training={"project": "a|b"}))
    assert r'| project | `"a\|b"` |' in text.splitlines()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "unknown"),
        ({"README.md": "---\nlicense: llama3.2\n---\ntext"}, "llama3.2"),
        ({"README.md": "---\nlicense: [broken\n---\n", "config.json": '{"license": "mit"}'}, "mit"),
        ({"README.md": "no front matter", "LICENSE": "\n   Apache License\n  Version 2.0"}, "apache-2.0"),
        ({"LICENSE.txt": "Gemma Terms of Use\n..."}, "Gemma Terms of Use"),
        ({"License.md": "MIT License\n..."}, "mit"),
        ({"NOTICE": "by somebody"}, "unknown"),
    ],
)
def test_licence_is_what_the_base_models_folder_says(tmp_path: Path, files: dict[str, str], found: str) -> None:
    """Front matter before config before licence file; what the config gives goes before all of them."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path) == found
    assert find_licence(tmp_path, "given") == "given"
    assert {file.name for file in licence_files(tmp_path)} == files.keys() - {"README.md", "config.json"}
