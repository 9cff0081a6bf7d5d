"""Every stage is a command of its own, which makes or takes what it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Finished, dpo, write_config
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    return write_config(tiny_config(folder, tracking__uri=None), folder / "config.yaml")


@pytest.fixture(scope="module")
def registered(config_file: Path) -> Finished:
    return dpo("register", str(config_file), store=config_file.parent / "store")


def test_register_makes_everything_it_reads(registered: Finished) -> None:
    """The last stage's command on an empty store runs the whole flow, and says which version it made."""
    assert registered.code == 0, registered.output + registered.log[-3000:]
    assert set(registered.ends()) == {"prepare", "score_reference", "sweep", "train", "evaluate", "register"}
    assert "version 1" in registered.output


def test_evaluate_takes_named_inputs_and_an_output_folder(
    registered: Finished, config_file: Path, tmp_path: Path
) -> None:
    """With both inputs named nothing else runs, and the report lies where it was asked for."""
    ends = registered.ends()
    finished = dpo(
        "evaluate", str(config_file), "evaluate.num_prompts=2",
        "--scored", ends["score_reference"]["path"], "--policy", ends["train"]["path"],
        "--output", str(tmp_path / "out"), store=registered.store,
    )  # fmt: skip

    assert finished.code == 0, finished.output
    assert set(finished.ends()) == {"evaluate"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["samples"]) == 2


def test_register_takes_a_named_policy_and_report(registered: Finished, config_file: Path) -> None:
    """The version that these two made before is found again; nothing else runs."""
    ends = registered.ends()
    finished = dpo(
        "register", str(config_file), "--policy", ends["train"]["path"], "--report", ends["evaluate"]["path"],
        store=registered.store,
    )  # fmt: skip

    assert finished.code == 0, finished.output
    assert set(finished.ends()) == {"register"}
    assert "version 1" in finished.output
