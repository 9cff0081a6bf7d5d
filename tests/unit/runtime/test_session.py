"""What is said where Ray does not start."""

from __future__ import annotations

from pathlib import Path

from tests.command import dpo, write_config
from tests.tiny import tiny_config


def test_ray_that_does_not_start_is_told_in_a_line(tmp_path: Path) -> None:
    """A failed run, and what to do; no traceback. Where Ray wants its folder lies a file."""
    (tmp_path / "taken").touch()
    config = write_config(tiny_config(tmp_path, compute__executor="ray"), tmp_path / "run.json")
    finished = dpo("run", str(config), RAY_TMPDIR=str(tmp_path / "taken"))
    assert finished.code == 1, finished.output
    assert "Ray does not start on this machine" in finished.output
    assert "compute.executor=local needs no Ray" in finished.output
    assert "Traceback" not in finished.output
