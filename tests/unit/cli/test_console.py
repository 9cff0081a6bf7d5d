"""What is shown on a real terminal and through a pipe."""

from __future__ import annotations

import io
import os
import pty
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_train.cli.console import _rule_table, _sample_table
from tests.command import DPO, dpo, write_config
from tests.tiny import tiny_config


def test_terminal_shows_bars_and_pipe_shows_lines(tmp_path: Path) -> None:
    """On a terminal: a bar with its count. Through a pipe: whole lines, no control sequences."""
    config = write_config(tiny_config(tmp_path, tracking__uri=None), tmp_path / "config.yaml")
    terminal, child_side = pty.openpty()
    command = [*DPO, "score-reference", str(config), f"store={tmp_path}/first"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "RAY_ADDRESS": ""}
    with subprocess.Popen(command, stdout=child_side, stderr=child_side, env=environment) as process:
        os.close(child_side)
        shown = _read_all(terminal)
    piped = dpo("score-reference", str(config), f"store={tmp_path}/second")

    assert process.returncode == 0, shown
    assert "━" in shown
    assert "200 pairs" in shown
    assert "\x1b[" in shown
    assert piped.code == 0, piped.output
    assert "\x1b[" not in piped.output
    assert "score_reference  200/200 pairs" in piped.output


def _read_all(descriptor: int) -> str:
    parts = []
    while True:
        try:
            block = os.read(descriptor, 1 << 16)
        except OSError:  # a pseudo-terminal ends with an error when its other side closes
            break
        if not block:
            break
        parts.append(block)
    os.close(descriptor)
    return b"".join(parts).decode(errors="replace")


def shown(table: Table) -> str:
    """What a terminal of 120 columns gets."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_samples_show_a_champion_where_there_is_one_and_keep_control_characters_away() -> None:
    """The data's answer is left to the report; markup and escape sequences of a model are text."""
    first = {"prompt": "user: hi", "answers": {"chosen (data)": "data", "reference": "\x1b[31mred", "policy": "[red]x"}}
    second = {"prompt": "user: ho", "answers": {"reference": "a", "policy": "b", "champion": "best"}}

    without, with_champion = shown(_sample_table([first])), shown(_sample_table([first, second]))

    assert "\x1b" not in without
    assert "\N{REPLACEMENT CHARACTER}[31mred" in without
    assert "[red]x" in without
    assert "data" not in without
    assert "champion" not in without
    assert "champion" in with_champion
    assert "best" in with_champion


def test_gate_is_told_rule_by_rule() -> None:
    """Outcome, limit, number with interval and n, and the reason; a rule without a number has an empty cell."""
    found = {"value": 0.64, "low": 0.59, "high": None, "n": 300}
    rules = [
        {"rule": "accuracy", "outcome": "undecided", "limit": "above 0.6", "found": found, "reason": "n is small"},
        {"rule": "win rate", "outcome": "not_applied", "limit": "above 0.5", "found": None, "reason": "no champion"},
    ]

    lines = [" ".join(line.replace("│", " ").split()) for line in shown(_rule_table(rules)).splitlines()]

    assert "accuracy undecided above 0.6 0.640 (0.590 to ?, n = 300) n is small" in lines
    assert "win rate not applied above 0.5 no champion" in lines
