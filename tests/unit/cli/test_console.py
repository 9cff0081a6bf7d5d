"""What is shown on a real terminal and through a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

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
