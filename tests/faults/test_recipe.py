"""SIGKILL in the middle of a recipe: the same command goes on, and finds what an unbroken one finds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dpo_train.recipes.results import RESULTS_JSON
from tests.command import dpo, start
from tests.unit.recipes.test_recipes import SENTIMENT, model

__all__ = ["model"]

pytestmark = pytest.mark.slow


def test_a_killed_recipe_goes_on(model: Path, tmp_path: Path) -> None:
    """Killed in the middle of its sweep, when one of the trials has been measured."""
    command = ("recipe", "sentiment", "--model", str(model), *SENTIMENT, "--folder")
    broken = tmp_path / "broken"
    process = start(*command, str(broken))
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("sweep") and "trial 1 of 2" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL, "".join(seen)
    assert not (broken / "sentiment").exists()
    process.stdout.close()

    again, unbroken = dpo(*command, str(broken)), dpo(*command, str(tmp_path / "unbroken"))

    assert again.code == unbroken.code == 0, again.output + unbroken.output
    assert "sft              reused" in again.output
    assert "sft              done" in unbroken.output
    found, expected = (
        json.loads((folder / "sentiment" / RESULTS_JSON).read_text(encoding="utf-8"))
        for folder in (broken, tmp_path / "unbroken")
    )
    assert found["figures"] == expected["figures"]
    assert found["claims"] == expected["claims"]
