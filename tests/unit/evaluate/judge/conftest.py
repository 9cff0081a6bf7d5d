"""Fixtures of the judges' tests."""

from __future__ import annotations

import sys

import pytest

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, no proxy before the test's own server, and a path of imports on which no judge's folder stays."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sys, "path", [*sys.path])
