"""``dpo sample``: preference data of the model's own making."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dpo_train import launch
from dpo_train.artifacts import Artifact
from dpo_train.cli.commands import load, watched
from dpo_train.cli.console import Display
from dpo_train.cli.processes import end_children
from dpo_train.data.prompts import read_prompt_lines
from dpo_train.errors import ConfigError, StoreError

HELP = "have the model answer prompts several times, and rank the answers by evaluate.judge"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", type=Path, help="JSON lines with `prompt` (text or messages), or a text file with a prompt a line"
    )
    parser.add_argument("target", type=Path, help="file to write, JSON lines that prepare.path takes (format: ranking)")
    parser.add_argument("--answers", type=_several, default=4, metavar="N", help="to each prompt (default: 4)")
    parser.add_argument("--temperature", type=_warm, default=1.0, metavar="T", help="of the answers (default: 1)")


def sample(arguments: argparse.Namespace) -> int:
    """Answers, rewards, and a file of ranked answers."""
    from dpo_train.stages.sample import RANKED_FILE
    from dpo_train.stages.sample import sample as stage

    config = launch.resolve_device(load(arguments))
    if config.evaluate.judge is None:
        raise ConfigError(
            "There is nothing to rank the answers by",
            got="evaluate.judge=null",
            expected="a judge that rewards (docs/evaluation.md)",
            fix="set evaluate.judge to kind: function or reward_model",
        )
    if arguments.target.exists():
        raise ConfigError(f"{arguments.target} exists already", fix="name another file, or remove it")
    try:
        text = arguments.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The prompts {arguments.prompts} cannot be read: {error}") from None
    prompts = read_prompt_lines(text, str(arguments.prompts))
    launch.check_store(config)
    made: list[Artifact] = []

    def work(display: Display) -> None:
        del display
        with launch.session(config), end_children():
            made.append(
                launch.run_step(
                    "sample",
                    config,
                    lambda on: stage(config, prompts, on, count=arguments.answers, temperature=arguments.temperature),
                )
            )

    code = watched(config, work, "")
    for artifact in made:
        try:
            arguments.target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(RANKED_FILE), arguments.target)
        except OSError as error:
            raise StoreError(f"{arguments.target} cannot be written: {error.strerror}") from None
        print(f"wrote {arguments.target}: {artifact.record.details['summary']}")
        print(f"to train on it: prepare.path={arguments.target} prepare.format=ranking prepare.pairing=all")
    return code


def _several(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of answers (2, 3, ...)")
    return int(text)


def _warm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature above 0; at 0 all answers are the same")
    return value
