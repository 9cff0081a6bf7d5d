"""Arguments and help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dpo_train.cli import (
    chat,
    commands,
    doctor,
    export,
    job,
    kubeflow,
    models,
    plan,
    reap,
    recipe,
    runs,
    sample,
    schedule,
)

_DESCRIPTION = """\
Preference data to an aligned, evaluated, registered model by Direct Preference Optimization.

  raw data -> prepare -> sft -> score-reference -> sweep -> train -> evaluate -> register
"""

_EPILOG = """\
start here:
  dpo init my.yaml                          a commented config for your data and model
  dpo run my.yaml                           the whole pipeline on this machine
  dpo run my.yaml train.beta=0.2            the same with another beta; only what depends on it runs again
  dpo runs my.yaml                          list and compare runs; dpo reproduce runs one again
  dpo ui my.yaml                            browse runs and models in MLflow
  dpo chat my.yaml                          talk to champion, challenger and reference side by side
  dpo promote my.yaml                       make the challenger the champion
  dpo export my.yaml FOLDER                 the champion as a plain Hugging Face folder
  dpo sample my.yaml prompts.jsonl pairs.jsonl     preference data of the model's own answers
  dpo recipe sentiment                      the DPO paper's experiments, with figures

on a cluster:
  dpo doctor my.yaml                        is everything there that this config needs?
  dpo plan my.yaml --gpu H100               what it takes: memory, hours, cost
  dpo submit my.yaml --wait                 the same pipeline on Kubeflow; dpo logs, dpo cancel, dpo runs --kfp
  dpo schedule my.yaml create --cron "0 3 * * *"     again every night

exit codes: 0 success; 1 the run failed; 2 a mistake in what was given; 3 complete, but the gate refused the model;
130 interrupted (the same command continues from the last complete output)
"""

STAGE_HELP = {
    "prepare": "raw data to validated, tokenised pairs",
    "sft": "pairs to a model fine-tuned on the chosen answers, if sft.enabled",
    "score-reference": "pairs to pairs with the reference's log-probs",
    "sweep": "scored pairs to the beta to train with",
    "train": "scored pairs to a policy",
    "evaluate": "policy and held-out pairs to a report with a verdict",
    "register": "policy and passing report to an MLflow model version",
}

INPUT_OPTIONS = {
    "prepare": ("--pairs", "output folder of prepare"),
    "sft": ("--sft", "output folder of sft"),
    "score_reference": ("--scored", "output folder of score-reference"),
    "sweep": ("--choice", "output folder of sweep"),
    "train": ("--policy", "output folder of train"),
    "evaluate": ("--report", "output folder of evaluate"),
}
"""By stage, the option that names its output when another stage reads it."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dpo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=commands.version())
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    whole = _with_config(subparsers, "run", "the whole pipeline on this machine", commands.run)
    whole.add_argument("--name", default="dpo", help="name of the run in MLflow (default: %(default)s)")
    for name, text in STAGE_HELP.items():
        stage = _with_config(subparsers, name, text, commands.stage)
        stage.set_defaults(stage=name.replace("-", "_"))
        _add_inputs(stage, name.replace("-", "_"))
        stage.add_argument(
            "--output", help="folder, here or at s3://, for the output (default: its address in the store)"
        )
    compiling = subparsers.add_parser("compile", help="write the Kubeflow pipeline as YAML")
    compiling.add_argument("output", type=Path, nargs="?", default=Path("dpo.yaml"), help="default: %(default)s")
    compiling.set_defaults(command=commands.compile_pipeline)
    ui = _with_config(subparsers, "ui", "browse runs and models in MLflow", commands.ui)
    ui.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    _with_config(subparsers, "runs", runs.RUNS_HELP, runs.runs, runs.add_runs_arguments)
    again = subparsers.add_parser("reproduce", help=runs.REPRODUCE_HELP, description=f"{runs.REPRODUCE_HELP}.")
    runs.add_reproduce_arguments(again)
    again.set_defaults(command=runs.reproduce)
    _with_config(subparsers, "submit", kubeflow.SUBMIT_HELP, kubeflow.submit, kubeflow.add_submit_arguments)
    _with_config(subparsers, "cancel", kubeflow.CANCEL_HELP, kubeflow.cancel, kubeflow.add_cancel_arguments)
    _with_config(subparsers, "logs", kubeflow.LOGS_HELP, kubeflow.logs, kubeflow.add_logs_arguments)
    _with_config(subparsers, "schedule", schedule.HELP, schedule.schedule, schedule.add_arguments)
    _with_config(subparsers, "doctor", doctor.HELP, doctor.doctor, doctor.add_arguments)
    _with_config(subparsers, "plan", plan.HELP, plan.plan, plan.add_arguments)
    promote = _with_config(subparsers, "promote", "make a registered version the champion", models.promote)
    promote.add_argument("--version", metavar="N", help="number or alias of the version (default: the challenger)")
    _with_config(subparsers, "rollback", "make the champion before this one champion again", models.rollback)
    _with_config(subparsers, "chat", chat.HELP, chat.chat, chat.add_arguments)
    _with_config(subparsers, "export", export.HELP, export.export, export.add_arguments)
    _with_config(subparsers, "sample", sample.HELP, sample.sample, sample.add_arguments)
    experiment = subparsers.add_parser("recipe", help=recipe.HELP)
    recipe.add_arguments(experiment)
    experiment.set_defaults(command=recipe.recipe)
    _with_config(subparsers, "config", "print the resolved config", commands.show_config)
    init = subparsers.add_parser("init", help="write a commented config for your own data and model")
    init.add_argument("path", type=Path, nargs="?", default=Path("dpo-config.yaml"), help="default: %(default)s")
    init.set_defaults(command=commands.init)
    gc = _with_config(subparsers, "gc", "list outputs that no run refers to, and remove them on request", commands.gc)
    gc.add_argument("--keep-runs", metavar="N", type=_count, help="forget all but the newest N runs first")
    gc.add_argument("--remove", action="store_true", help="remove what is listed")
    _plain(subparsers, "job", job.HELP, job.job, job.add_arguments)
    _plain(subparsers, "reap", reap.HELP, reap.reap, reap.add_arguments)
    return parser


def _plain(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    command: Callable[[argparse.Namespace], int],
    add_arguments: Callable[[argparse.ArgumentParser], None],
) -> None:
    """A command that has no config: clusters call it."""
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add_arguments(parser)
    parser.set_defaults(command=command)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs (0, 1, 2, ...)")
    return int(text)


def _with_config(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    command: Callable[[argparse.Namespace], int],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("config", type=Path, help="YAML file (`dpo init` writes one)")
    add_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace single values, e.g. train.beta=0.2"
    )
    parser.set_defaults(command=command)
    return parser


def _add_inputs(parser: argparse.ArgumentParser, stage: str) -> None:
    from dpo_train.launch import INPUTS

    parser.set_defaults(**{f"from_{needed}": None for needed in INPUT_OPTIONS})
    for needed in INPUTS[stage]:
        option, text = INPUT_OPTIONS[needed]
        parser.add_argument(
            option, dest=f"from_{needed}", metavar="DIR", help=f"{text} (default: made or reused first)"
        )
