"""`dpo export`: which model it takes, what it says, and that cut short it leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_train.cli import main
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess
from dpo_train.tracking import Tracking
from tests.command import dpo, write_config
from tests.mlflow.made import made_policy
from tests.projects import Project, project
from tests.tiny import CHAT_TEMPLATE, tiny_config

__all__ = ["project"]


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_champion_is_exported_unless_another_is_named(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default the champion, which is said; by alias or number any other version."""
    assert main(["export", str(project.file), str(tmp_path / "default")]) == 0
    said = capsys.readouterr().out
    assert main(["export", str(project.file), str(tmp_path / "alias"), "--alias", "challenger"]) == 0
    assert main(["export", str(project.file), str(tmp_path / "number"), "--version", "2"]) == 0

    assert said.startswith("writing dpo-policy version 1\nwrote ")
    assert f"wrote {tmp_path}/default: 7 files, 0." in said
    assert project.adapters.record.digest in card(tmp_path / "default")
    assert project.whole.record.digest in card(tmp_path / "alias")
    assert card(tmp_path / "alias") == card(tmp_path / "number")


def test_without_a_champion_it_is_the_challenger(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The alias that a registration gives, here another one's name for version 2."""

    client, name = Tracking(project.config).client, "without-champion"
    client.create_registered_model(name)
    client.create_model_version(name, client.get_model_version_download_uri(project.config.register.model_name, "2"))
    client.set_registered_model_alias(name, "challenger", "1")

    assert main(["export", str(project.file), str(tmp_path / "out"), f"register.model_name={name}"]) == 0
    assert "writing without-champion version 1\n" in capsys.readouterr().out
    assert project.whole.record.digest in card(tmp_path / "out")


def test_training_is_exported_from_its_folder(project: Project, tmp_path: Path) -> None:
    """`--from` needs no registry."""
    command = ["export", str(project.file), str(tmp_path / "out"), "--from", str(project.adapters.path)]
    assert main([*command, "--dtype", "bfloat16", f"tracking.uri=sqlite:///{tmp_path}/none.db"]) == 0

    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "none.db").exists()


def test_training_ends_where_its_answers_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat template of one's own ends turns with another token; with another store that is not known, and told."""
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|pad|>"))
    config = tiny_config(tmp_path, prepare__chat_template=str(tmp_path / "own.jinja"))
    local = InProcess()
    policy = made_policy(config, scored=score_reference(config, prepare(config, local), local).record.digest)
    file = write_config(config, tmp_path / "config.json")

    assert main(["export", str(file), str(tmp_path / "out"), "--from", policy.home]) == 0
    assert "are not in" not in capsys.readouterr().out
    command = ["export", str(file), str(tmp_path / "elsewhere"), "--from", policy.home, f"store={tmp_path}/none"]
    assert main(command) == 0
    assert "answers end at the tokenizer's end token alone\n" in capsys.readouterr().out

    ends = [
        json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"]
        for name in ("out", "elsewhere")
    ]
    assert ends == [[2, 0], 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["register.model_name=nobody"], "There is no registered model 'nobody'"),
        (["--version", "7"], "dpo-policy has no version '7'"),
        (["--public"], "--public is about what --push creates"),
        (["--from", "/nowhere"], "/nowhere holds no output"),
    ],
)
def test_mistakes_are_one_line(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Exit code 2, and nothing is written."""
    assert main(["export", str(project.file), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dpo: {said}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signal", ["TERM", "INT"])
@pytest.mark.slow
def test_cut_short_it_leaves_nothing(project: Project, tmp_path: Path, signal: str) -> None:
    """The signal comes while the converter runs, when the model folder is written already."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "convert_hf_to_gguf.py"
    program.write_text(f'#!/bin/sh\nls "$1" >"{tmp_path}/seen"\nkill -{signal} $PPID\nexec sleep 300\n')
    program.chmod(0o755)

    path = f"{tmp_path}/bin:/usr/bin:/bin"
    done = dpo("export", str(project.file), str(tmp_path / "out"), "--gguf", PATH=path)

    assert done.code == 130, done.output
    assert "model.safetensors" in (tmp_path / "seen").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bin", "seen"]
