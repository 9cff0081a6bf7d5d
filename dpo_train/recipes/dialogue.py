"""Single-turn dialogue's data: what a person replied in this conversation, against a reply from another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from dpo_train.recipes.corpora import exchanges
from dpo_train.recipes.winrates import Task


def records(seed: int) -> Iterator[dict[str, Any]]:
    """Conversations two by two: none is in two couples, and each reply is as likely the chosen one as the rejected."""
    found = exchanges()
    random.Random(seed).shuffle(found)
    for first, second in zip(found[::2], found[1::2], strict=False):
        if first.reply != second.reply:
            yield {
                "prompt": first.context,
                "chosen": first.reply,
                "rejected": second.reply,
                "group": f"{first.id}+{second.id}",
            }


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
