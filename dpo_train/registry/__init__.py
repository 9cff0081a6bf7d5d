"""MLflow model versions: only a passing report registers, the same result never twice, one promotion at a time.

    report, policy -> check_verdict -> register_version (layout.py: the folder, card.py: its README) -> alias challenger
    challenger -> promote -> alias champion -> rollback -> the champion before it         (lock.py: one at a time)
    champion -> fetch -> a model folder, to be compared with or served

A version appears in the registry with all its tags at once, after its files: there are no half-made versions.
"""

from __future__ import annotations

from dpo_train.registry.card import Card, accuracy_line, card_text, find_licence, licence_files
from dpo_train.registry.layout import Package
from dpo_train.registry.lock import LockedError
from dpo_train.registry.promote import MovedError, Promotion, champion_before, promote, rollback
from dpo_train.registry.versions import (
    CHAMPION,
    DIGEST_TAG,
    PASSED_TAG,
    POLICY_TAG,
    RegisteredVersion,
    champion,
    check_verdict,
    fetch,
    find_version,
    register_version,
)

__all__ = [
    "CHAMPION",
    "DIGEST_TAG",
    "PASSED_TAG",
    "POLICY_TAG",
    "Card",
    "LockedError",
    "MovedError",
    "Package",
    "Promotion",
    "RegisteredVersion",
    "accuracy_line",
    "card_text",
    "champion",
    "champion_before",
    "check_verdict",
    "fetch",
    "find_licence",
    "find_version",
    "licence_files",
    "promote",
    "register_version",
    "rollback",
]
