"""The README's notebook lines, run as they stand there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import dpo_train
from tests.command import write_config
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]


def test_readme_runs_in_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The flow from a notebook: metrics, the report's path and the model's address come out."""
    pytest.importorskip("mlflow")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    write_config(tiny_config(tmp_path), tmp_path / "my.yaml")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    exec(block, names)

    assert len([line for line in block.splitlines() if line]) == 5
    printed = capsys.readouterr().out
    assert "models:/dpo-policy/1" in printed
    assert os.path.isfile(names["result"].report)  # noqa: PTH113
    assert names["result"].metrics["heldout/accuracy_low"] > 0.5


def test_everything_promised_is_there() -> None:
    """What __all__ names can be imported, with a docstring."""
    for name in dpo_train.__all__:
        assert getattr(dpo_train, name).__doc__
