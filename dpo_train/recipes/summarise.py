"""Summarisation's data: a package's description and its synopsis; and docstrings, another domain of the same task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dpo_train.recipes.corpora import Docstring, Package, docstrings, package_descriptions
from dpo_train.recipes.winrates import Task, couples

QUESTION = "Summarise this in one short line:\n\n"
MOST_WORDS = 80
"""Of a description: the longer half would take two thirds of all the time."""


def records(seed: int) -> Iterator[dict[str, Any]]:
    """Of Debian packages."""
    yield from _couples(package_descriptions(), seed)


def others(seed: int) -> Iterator[dict[str, Any]]:
    """Of functions and classes."""
    yield from _couples(docstrings(), seed)


def _couples(texts: Sequence[Package | Docstring], seed: int) -> Iterator[dict[str, Any]]:
    short = (each for each in texts if len(each.description.split()) <= MOST_WORDS)
    yield from couples(
        ((each.name, QUESTION + each.description, each.synopsis) for each in short), seed, neighbours=True
    )


TASK = Task(
    name="summarise",
    title="Summarisation",
    records=records,
    others=others,
    papers_model="GPT-J",
    deviations=(
        f"descriptions of at most {MOST_WORDS} words and synopses of Debian packages in place of Reddit's TL;DR; the "
        "preferences are constructed: a text's own synopsis is preferred over that of the next by name, which is often "
        "about something alike",
        "docstrings of Python functions, of which the judge has seen none either, in place of CNN/DailyMail as the "
        "domain that is not trained on",
    ),
)
