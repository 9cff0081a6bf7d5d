"""Single-turn dialogue's data: what a person replied in this conversation, against a reply from another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_train.recipes.corpora import exchanges
from dpo_train.recipes.winrates import Task, couples


def records(seed: int) -> Iterator[dict[str, Any]]:
    """Of conversations."""
    yield from couples(((each.id, each.context, each.reply) for each in exchanges()), seed)


TASK = Task(
    name="dialogue",
    title="Single-turn dialogue",
    records=records,
    others=None,
    papers_model="Pythia-2.8B",
    deviations=(
        "conversations of two people (chitchat-dataset) in place of Anthropic's HH; the preferences are constructed: "
        "the reply that was given is preferred over one from another conversation",
    ),
)
