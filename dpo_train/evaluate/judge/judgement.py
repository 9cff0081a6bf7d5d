"""What a judge is asked, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WIN, TIE, LOSS = 1.0, 0.5, 0.0
"""Outcomes, seen from our answer."""


@dataclass(frozen=True, kw_only=True)
class Matchup:
    """Two answers to one prompt."""

    prompt_id: str
    prompt: tuple[Mapping[str, str], ...]
    """Messages {role, content}."""
    ours: str
    theirs: str


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A judge's word on a matchup."""

    outcome: float | None
    """1 for our answer, 0.5 for a tie, 0 for theirs; None: the judge said nothing usable."""
    orders: tuple[float | None, float | None] | None = None
    """The outcome when it saw ours first, and theirs first; None: it did not see two answers side by side."""
    reason: str = ""
    """Why there is no outcome."""
