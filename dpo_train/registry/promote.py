"""The alias ``champion``: forward to a version whose report passed, and back to the champions before it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_train.errors import UserError
from dpo_train.registry.lock import LEASE_SECONDS, locked
from dpo_train.registry.versions import CHAMPION, PASSED_TAG, RegisteredVersion, existing, lookup

HISTORY_TAG = "dpo.champions_before"
"""Of the registered model: a JSON list of the versions that were champion before the one that is, the last one last."""
MOST_HISTORY = 100


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """The alias has moved; from None: there was no champion. Equal versions: it was there already."""

    name: str
    version: str
    previous: str | None


class MovedError(UserError):
    """The champion is another than the one that was expected."""


_ANY = "any"


def promote(
    client: Any, name: str, which: str, *, instead_of: str | None = _ANY, lease_seconds: float = LEASE_SECONDS
) -> Promotion:
    """Makes a version the champion.

    Args:
        which: alias or number of the version.
        instead_of: number of the version that must be the champion now, None for none; default: whichever is.

    Raises:
        MovedError: the champion is another than ``instead_of``.
        UserError: there is no such version, or its report did not pass.
        LockedError: another promotion is under way.
    """
    with locked(client, name, lease_seconds=lease_seconds) as check:
        wanted = lookup(client, name, which)
        if wanted.tags.get(PASSED_TAG) != "true":
            raise UserError(
                f"{name} version {wanted.version} is not known to have passed its gate, and stays what it is",
                got=f"the tag {PASSED_TAG} is {wanted.tags.get(PASSED_TAG)!r}",
                expected="a version that `dpo register` made from a passing report",
            )
        history, previous = _history(client, name)
        if previous == wanted.version:
            return Promotion(name=name, version=wanted.version, previous=previous)
        if instead_of not in {_ANY, previous}:
            raise MovedError(
                f"The champion of {name} has changed meanwhile",
                got=f"version {previous}",
                expected=f"version {instead_of}",
            )
        if previous is not None:
            # The history first: cut short here, its last entry is the champion, which _history leaves out.
            check()
            _write_history(client, name, [*history, previous])
        check()
        client.set_registered_model_alias(name, CHAMPION, wanted.version)
        return Promotion(name=name, version=wanted.version, previous=previous)


def rollback(client: Any, name: str, *, lease_seconds: float = LEASE_SECONDS) -> Promotion:
    """Makes the last champion before this one champion again.

    Passed over are versions that were deleted since, and those that no passing report stands behind.

    Raises:
        UserError: there is none.
        LockedError: a promotion is under way.
    """
    with locked(client, name, lease_seconds=lease_seconds) as check:
        history, current = _history(client, name)
        passed = {version.version for version in existing(client, name) if version.tags.get(PASSED_TAG) == "true"}
        while history and (history[-1] == current or history[-1] not in passed):
            history.pop()
        if current is None or not history:
            raise UserError(
                f"There is no champion of {name} to go back to",
                got=f"the champion is {'none' if current is None else f'version {current}, with none before it'}",
                fix="`dpo promote` makes any version that passed the champion",
            )
        # The alias first: cut short here, the history's last entry is the champion, as above.
        check()
        client.set_registered_model_alias(name, CHAMPION, history[-1])
        check()
        _write_history(client, name, history[:-1])
        return Promotion(name=name, version=history[-1], previous=current)


def champion_before(client: Any, name: str) -> RegisteredVersion | None:
    """The last champion before the one that is, of those that are still there."""
    history, current = _history(client, name)
    there = {version.version: version for version in existing(client, name) if version.version != current}
    return next((there[version] for version in reversed(history) if version in there), None)


def _history(client: Any, name: str) -> tuple[list[str], str | None]:
    """The champions before, and the champion."""
    model = client.get_registered_model(name)
    current = model.aliases.get(CHAMPION)
    current = None if current is None else str(current)
    history: list[str] = json.loads(model.tags.get(HISTORY_TAG, "[]"))
    while history and history[-1] == current:
        history.pop()
    return history, current


def _write_history(client: Any, name: str, history: Sequence[str]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(list(history)[-MOST_HISTORY:]))
