"""The command line on what needs no run: help, config, init, compile, and the docs made from the config."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dpo_train.cli import main, templates
from dpo_train.cli.parser import STAGE_HELP, build_parser
from dpo_train.config import RunConfig, load_config, parse_config
from dpo_train.decoding import walk_options

ROOT = Path(__file__).parents[3]


def test_help_teaches_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`dpo --help` names each command, the flow and the exit codes."""
    with pytest.raises(SystemExit) as exit_info:
        build_parser().parse_args(["--help"])

    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for word in ("run", "compile", "ui", "config", "init", "gc", "exit codes", "dpo init my.yaml", *STAGE_HELP):
        assert word in text


def test_config_prints_what_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The resolved config is YAML that decodes to the same config."""
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: ./m}\nprepare: {path: ./p.jsonl}\n")

    assert main(["config", str(path), "train.beta=0.25", "sweep.betas=[0.1, 1]"]) == 0

    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["train"]["beta"] == 0.25
    assert parse_config(printed) == load_config(path, ["train.beta=0.25", "sweep.betas=[0.1, 1]"])


def test_init_writes_a_config_that_decodes_and_leaves_an_existing_file(tmp_path: Path) -> None:
    """Every key stands there; a second init does not overwrite."""
    path = tmp_path / "my.yaml"

    assert main(["init", str(path)]) == 0
    text = path.read_text()
    assert parse_config(text).train.beta == 0.1
    assert main(["init", str(path)]) == 2
    assert path.read_text() == text


@pytest.mark.parametrize("judge", ["function", "reward_model", "endpoint"])
def test_every_line_of_init_can_be_switched_on(judge: str) -> None:
    """Without their "#", the lines that show defaults decode to the defaults; only optional sections change.

    Of the three judges one can be chosen.
    """
    text = templates.commented_config()
    switched_on = re.sub(r"^(\s*)#(\w+: )", r"\1\2", text, flags=re.MULTILINE)
    switched_on = re.sub(rf"^\s*judge: {{kind: (?!{judge}).*\n", "", switched_on, flags=re.MULTILINE)

    default, everything = parse_config(text), parse_config(switched_on)

    assert everything.evaluate.judge is not None
    assert everything.evaluate.judge.kind == judge
    sections = {name: getattr(everything, name) for name in ("train", "sft")}
    assert all(section.lora is not None for section in sections.values())
    without = {name: dataclasses.replace(section, lora=None) for name, section in sections.items()}
    without["evaluate"] = dataclasses.replace(everything.evaluate, judge=None)
    assert dataclasses.replace(everything, **without) == default


def test_reference_has_a_table_for_each_kind_of_judge() -> None:
    """With the keys of that kind alone; a line in a text does not end a cell."""
    text = templates.reference()
    table = text.partition("## evaluate.judge (kind: reward_model)")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE) == [
        "evaluate.judge.kind",
        "evaluate.judge.path",
        "evaluate.judge.max_tokens",
    ]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in text.splitlines() if line.startswith("|"))


def test_every_option_has_a_help_text() -> None:
    """What `dpo init` and the reference show is never empty."""
    assert [key for key, item in walk_options(RunConfig) if not item.metadata.get("help")] == []


def test_config_reference_is_fresh() -> None:
    """`make docs` was run after the last change of the config."""
    assert (ROOT / "docs" / "config.md").read_text() == templates.reference()


def test_example_config_decodes() -> None:
    """The demo's config is valid and asks for what the demo promises."""
    config = load_config(ROOT / "examples" / "demo.yaml")

    assert len(config.sweep.betas) == 3
    assert config.compute.workers == 2
    assert config.evaluate.min_heldout_pairs >= 200


def test_compile_writes_the_pipeline(tmp_path: Path) -> None:
    """`dpo compile` gives what is committed."""
    pytest.importorskip("kfp")

    assert main(["compile", str(tmp_path / "dpo.yaml")]) == 0
    assert (tmp_path / "dpo.yaml").read_text() == (ROOT / "pipelines" / "dpo.yaml").read_text()
