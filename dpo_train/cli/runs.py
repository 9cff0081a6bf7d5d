"""`dpo runs` and `dpo reproduce`: what MLflow holds, in the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_train import launch
from dpo_train.artifacts import local_copy
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ConfigError, StoreError, UserError
from dpo_train.identity import code_version, library_versions

if TYPE_CHECKING:
    from dpo_train.tracking.search import Row, Runs

RUNS_HELP = "list, filter and sort runs; show one; send what MLflow has not got yet"
REPRODUCE_HELP = "print, or run, the exact command that made a run, from what MLflow holds"

_COLUMNS = ("name", "status", "age", "accuracy", "beta", "KL", "version", "run id")
_KINDS = ("pipeline", "stage", "trial", "all")
NEVER = 2**31
"""Steps between two looks at the validation pairs in a trial of which only the end counts."""


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("run", nargs="?", metavar="RUN_ID", help="show this run and what lies below it")
    parser.add_argument("--kind", choices=_KINDS, default="pipeline", help="which runs (default: %(default)s)")
    parser.add_argument("--where", metavar="FILTER", help='MLflow\'s filter, e.g. "metrics.heldout/accuracy > 0.7"')
    parser.add_argument(
        "--sort", metavar="ORDER", help='MLflow\'s order, e.g. "metrics.samples/kl ASC" (default: the newest first)'
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each run, one a line")
    parser.add_argument("--kfp", action="store_true", help="list the runs on Kubeflow Pipelines instead")
    parser.add_argument("--send", action="store_true", help="send what an outage of MLflow has left in the store")


def add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """All of `dpo reproduce`: the config comes from MLflow, so that none is asked for."""
    parser.add_argument("where", metavar="URI", help="MLflow's tracking URI, or a config file that has it")
    parser.add_argument("run", metavar="RUN_ID", help="a pipeline's run, a stage's or a trial's")
    parser.add_argument("--output", type=Path, metavar="FILE", help="config file to write (default: RUN_ID.yaml)")
    parser.add_argument("--run", dest="execute", action="store_true", help="run the command")


def runs(arguments: argparse.Namespace) -> int:
    """A table of runs, one run's tree, or what could be sent."""
    from dpo_train.tracking import patience

    overrides = list(arguments.overrides)
    if arguments.run is not None and "=" in arguments.run:  # argparse takes the first override for the run
        overrides.insert(0, arguments.run)
        arguments.run = None
    config = load_config(arguments.config, overrides)
    launch.use_storage(config)
    if arguments.limit < 1:
        raise ConfigError("--limit must be at least 1", got=arguments.limit)
    if arguments.kfp:
        from dpo_train.cli.kubeflow import kubeflow_runs

        return kubeflow_runs(config, arguments.limit)
    with patience():
        return _send(config) if arguments.send else _list(config, arguments)


def _list(config: RunConfig, arguments: argparse.Namespace) -> int:
    from dpo_train.tracking import tracking_uri
    from dpo_train.tracking.search import Runs

    found = Runs(tracking_uri(config))
    if arguments.run is not None:
        rows = list(_tree(found, found.get(arguments.run)))
    else:
        kind = None if arguments.kind == "all" else arguments.kind
        listed = found.find(
            config.tracking.experiment, kind=kind, where=arguments.where, sort=arguments.sort, limit=arguments.limit
        )
        rows = [(0, row) for row in listed]
    if arguments.json:
        for _, row in rows:
            print(json.dumps(dataclasses.asdict(row)))
    elif rows:
        _print_table(rows)
        for text in [row.error for _, row in rows if row.error] if arguments.run else []:
            print(f"\n{text}")
    else:
        print(f"no such runs (--kind {arguments.kind})")
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Writes the run's config to a file, prints the command and what differs here, and with --run runs it."""
    from dpo_train.tracking import patience
    from dpo_train.tracking.search import Runs

    uri = _uri(arguments.where)
    with patience():
        found = Runs(uri)
        row = top = found.get(arguments.run)
        # Above a run that a Kubeflow plugin has opened may stand one of its own, which holds nothing of ours.
        while top.kind != "pipeline" and top.parent is not None:
            top = found.get(top.parent)
        content = found.config(top.run_id)
        command = _command(found, row)
    notes = [*_differences(top.tags), *_put_address(content, uri)]
    if row.kind == "trial":
        _as_trial(content)
    file = arguments.output or Path(f"{row.run_id}.yaml")
    try:
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror}", fix="name another with --output") from None
    load_config(file, [])
    words = [command[0], str(file), *command[1:]]
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    print(shlex.join(["dpo", *words]), flush=True)
    if not arguments.execute:
        return 0
    from dpo_train.cli import main

    return main(words)


def _put_address(content: dict[str, Any], uri: str) -> Iterator[str]:
    """Makes the config's MLflow the one that was asked: what stands there may be another name of that very server.

    Yields:
        what a person has to give, because it is written nowhere.
    """
    from dpo_train.tracking import redacted
    from dpo_train.tracking.client import URI

    if redacted(uri) == uri:
        content["tracking"]["uri"] = uri
    else:
        # A file lives longer than a password should. The command below, in this process, finds it here.
        content["tracking"]["uri"] = None
        os.environ[URI] = uri
        yield f"the address of MLflow holds a password and is not in the file: set {URI} to it"
    for key, text in _texts(content):
        if "***" in text and "://" in text:
            yield f"{key} was recorded without its password: {text}"


def _texts(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a config's tree, by its dotted name."""
    if isinstance(tree, str):
        yield name, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _texts(value, f"{name}.{key}" if name else str(key))


def _as_trial(content: dict[str, Any]) -> None:
    """Makes the training of a pipeline's config that of a trial, as ``stages/sweep_run.py`` has it; what was varied is
    in the command, and nothing is to be swept again."""
    sweep, train = content.pop("sweep"), content["train"]
    if sweep.get("use", "settings") == "settings":
        train |= {"max_steps": sweep["max_steps"] or train["max_steps"], "evaluate_steps": NEVER}
        train |= {"keep": "last", "patience": None, "best_metric": "loss"}


def _uri(where: str) -> str:
    from dpo_train.tracking import tracking_uri

    return where if "://" in where else tracking_uri(load_config(Path(where), []))


def _command(found: Runs, row: Row) -> list[str]:
    """The run's command line behind `dpo`, but for the config file, which comes second."""
    if row.kind == "pipeline":
        return ["run", "--name", row.name]
    if row.kind == "stage":
        return [row.tags["dpo.stage"].replace("_", "-")]
    if row.kind == "trial":
        settings = found.parameters(row.run_id)
        return ["train", *(f"{key}={text}" for key, text in sorted(settings.items()))]
    raise UserError(f"The run {row.run_id} was not made by dpo", got=row.name)


def _differences(tags: Mapping[str, str]) -> list[str]:
    """What is not here as it was there."""
    recorded = {"code": tags.get("dpo.code_version")} | {
        name: tags.get(f"dpo.version.{name}") for name in library_versions()
    }
    here = {"code": code_version()} | library_versions()
    lines = [
        f"{name} was {recorded[name]}, is {version} here"
        for name, version in here.items()
        if recorded[name] not in {None, version}
    ]
    folder = tags.get("dpo.folder")
    if folder not in {None, str(Path.cwd())}:
        lines.append(f"relative paths in the config belong to the folder {folder}")
    return lines


def _send(config: RunConfig) -> int:
    from dpo_train.tracking import Tracking, send_left_behind

    sent = send_left_behind(Tracking(config), local_copy(config.store))
    for name, problem in sent:
        print(f"{name}: {'sent' if problem is None else problem}")
    if not sent:
        print("nothing waits to be sent")
    return 1 if any(problem for _, problem in sent) else 0


def _tree(found: Runs, row: Row, depth: int = 0) -> Sequence[tuple[int, Row]]:
    if row.kind == "trial":  # nothing lies below, and there may be hundreds
        return [(depth, row)]
    below = [one for child in found.children(row.run_id) for one in _tree(found, child, depth + 1)]
    return [(depth, row), *below]


def _print_table(rows: Sequence[tuple[int, Row]]) -> None:
    """A table where a person looks; where a program reads, the same cells between tabs."""
    cells = [_cells(depth, row) for depth, row in rows]
    if not sys.stdout.isatty():
        print("\t".join(_COLUMNS))
        for line in cells:
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in _COLUMNS:
        is_number = column in {"age", "beta", "KL"}
        table.add_column(column, justify="right" if is_number else "left", no_wrap=column == "run id")
    for line in cells:
        table.add_row(*map(escape, line))
    Console(highlight=False).print(table)


def _cells(depth: int, row: Row) -> list[str]:
    accuracy = _number(row.accuracy, ".3f")
    if row.accuracy_low is not None and row.accuracy_high is not None:
        accuracy += f" [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]"
    return [
        "  " * depth + row.name,
        row.status.lower(),
        _age(time.time() - row.started / 1000),
        accuracy,
        _number(row.beta, "g"),
        _number(row.kl, ".2f"),
        row.version or "",
        row.run_id,
    ]


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)


def _age(seconds: float) -> str:
    """The largest unit that counts at least two: "90 s" is 90 s, "40 h" is 40 h."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
