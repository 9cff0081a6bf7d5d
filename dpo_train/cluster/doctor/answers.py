"""What a check says. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_train.errors import DpoError

Status = Literal["pass", "fail", "unchecked"]
SCHEMA_VERSION = 1
"""Of the JSON; a new one where a key goes or changes its meaning."""

_FIX = " What to do: "


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a check has found out."""

    status: Status
    text: str
    mend: str | None = None
    """What to do; where it could not be checked, how it could."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: a check's answer under its name."""

    name: str
    status: Status
    text: str
    mend: str | None = None


def passed(text: str) -> Answer:
    """It is there."""
    return Answer(status="pass", text=text)


def failed(text: str, mend: str) -> Answer:
    """It is not, and this is what to do."""
    return Answer(status="fail", text=text, mend=mend)


def unchecked(text: str, mend: str | None = None) -> Answer:
    """Nobody knows, and this is why."""
    return Answer(status="unchecked", text=text, mend=mend)


def answer_of(error: DpoError, status: Status = "fail") -> Answer:
    """An error of ours, its advice apart from the rest."""
    text, _, fix = str(error).partition(_FIX)
    return Answer(status=status, text=text.rstrip("."), mend=fix.rstrip(".") or None)


def counts(findings: Sequence[Finding]) -> dict[Status, int]:
    """How many lines of each kind."""
    kinds: tuple[Status, ...] = ("pass", "fail", "unchecked")
    return {kind: sum(finding.status == kind for finding in findings) for kind in kinds}


def summary(findings: Sequence[Finding]) -> str:
    """One line: "11 pass, 1 fails, 2 not checkable"."""
    number = counts(findings)
    words = {
        "pass" if number["pass"] != 1 else "passes": number["pass"],
        "fail" if number["fail"] != 1 else "fails": number["fail"],
        "not checkable": number["unchecked"],
    }
    return ", ".join(f"{count} {word}" for word, count in words.items() if count or "fail" in word)


def to_json(findings: Sequence[Finding]) -> Mapping[str, Any]:
    """All lines in plain types."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ok": not counts(findings)["fail"],
        "counts": counts(findings),
        "findings": [
            {"name": each.name, "status": each.status, "text": each.text, "mend": each.mend} for each in findings
        ],
    }
