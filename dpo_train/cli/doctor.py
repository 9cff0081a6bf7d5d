"""`dpo doctor`: is everything there that a config needs? A line for each check, with the mend."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from dpo_train.cli.quiet import quiet
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import UserError

if TYPE_CHECKING:
    from dpo_train.cluster.doctor import Finding
    from dpo_train.cluster.kubeflow.package import Package

HELP = "check that everything is there that a config needs"

_MARKS = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "unchecked": "[yellow]?   [/]"}
FAILS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("--json", action="store_true", help="the same for machines")


def doctor(arguments: argparse.Namespace) -> int:
    """Prints the lines and returns 2 if one of them fails."""
    return examine(load_config(arguments.config, arguments.overrides), as_json=arguments.json)


def examine(config: RunConfig, *, as_json: bool = False) -> int:
    """The same of a config that is read already."""
    from dpo_train.cluster.doctor import checks_of, run, to_json

    checks = checks_of(config, _package(config))
    console = Console(file=sys.stdout, highlight=False)
    with quiet():
        found = run(checks)
        findings = list(found) if as_json else _shown(found, [check.name for check in checks], console)
    if as_json:
        print(json.dumps(to_json(findings), indent=2))
    return FAILS if any(finding.status == "fail" for finding in findings) else 0


def _shown(found: Iterable[Finding], names: Sequence[str], console: Console) -> list[Finding]:
    """Prints each finding when it is there, and how many there were."""
    from dpo_train.cluster.doctor import summary

    width = max(map(len, names), default=0)
    findings = []
    for finding in found:
        findings.append(finding)
        console.print(
            f"{_MARKS[finding.status]}  {escape(finding.name):{width}}  {escape(finding.text)}", soft_wrap=True
        )
        if finding.mend is not None:
            console.print(f"{'':4}  {'':{width}}  [dim]->[/] {escape(finding.mend)}", soft_wrap=True)
    console.print(f"\n[bold]{summary(findings)}[/]")
    return findings


def _package(config: RunConfig) -> Package | None:
    """The compiled pipeline, if Kubeflow is asked for; None also where it cannot be read, which is a line's concern."""
    from dpo_train.cluster.doctor import uses_kubeflow

    if not uses_kubeflow(config):
        return None  # kfp takes seconds to import
    try:
        from dpo_train.cli.kubeflow import compiled_pipeline

        return compiled_pipeline()
    except (UserError, ImportError):
        return None
