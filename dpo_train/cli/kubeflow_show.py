"""What a person sees of runs on Kubeflow Pipelines: steps while they run, lists, what came of a run."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dpo_train.config import RunConfig
from dpo_train.errors import RunError, UserError

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.client import Kubeflow
    from dpo_train.cluster.kubeflow.package import Step
    from dpo_train.cluster.kubeflow.runs import RunView, StepView

OUTCOME_MARK = "dpo-outcome "
"""Before the JSON with ``outcome`` and ``why`` among the lines that a step prints."""

_GATE_STEP = "register"
"""In which the gate's word is heeded."""
_OUTCOME_STEPS = (_GATE_STEP, "resolve")
_GOOD = frozenset({"registered", "promoted", "unchanged", "refused"})
"""What can have come of a run that has succeeded."""
_COLUMNS = ("name", "status", "age", "took", "run id")
_COLOURS = {"RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "CANCELED": "yellow"}
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Steps:
    """Follows a run: a live table on a terminal, elsewhere a line for every change."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._run: RunView | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self) -> Steps:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def changed(self, run: RunView) -> None:
        """Shows what is new."""
        before, self._run = self._run, run
        if self._live is not None:
            self._live.refresh()
            return
        for line in changes(before, run):
            print(line, flush=True)

    def tell(self, line: str) -> None:
        """A line for people, above the table if there is one."""
        self._console.print(escape(line), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for column in ("step", "status", "started", "took"):
            table.add_column(column, justify="right" if column == "took" else "left")
        for step in self._run.steps if self._run else ():
            colour = _COLOURS.get(step.state, "dim")
            started = "" if step.started is None else clock(step.started)
            table.add_row(escape(step.name), f"[{colour}]{step.state.lower()}[/]", started, _took(step))
        return table


def changes(before: RunView | None, now: RunView) -> Iterator[str]:
    """A line for every step, and the run, whose state is not what it was."""
    known = {step.name: step.state for step in before.steps} if before else {}
    for step in now.steps:
        if step.state in {known.get(step.name, "PENDING"), "PENDING"}:
            continue
        when = step.started if step.state == "RUNNING" else step.ended
        duration = f" after {_took(step)}" if step.ended and step.started and step.state != "SKIPPED" else ""
        yield f"{clock(when)}  {step.name:16s} {step.state.lower()}{duration}"
    if before is None or before.state != now.state:
        yield f"{clock(now.ended if now.has_ended else None)}  {'run':16s} {now.state.lower()}"


def clock(moment: datetime.datetime | None) -> str:
    """The time of day here; without a moment, now."""
    local = datetime.datetime.now().astimezone() if moment is None else moment.astimezone()
    return f"{local:%H:%M:%S}"


def print_runs(runs: Sequence[RunView]) -> None:
    """A table where a person looks; where a program reads, the same cells between tabs."""
    now = datetime.datetime.now(tz=datetime.UTC)
    cells = [
        (
            run.name,
            run.state.lower(),
            "" if run.created is None else duration((now - run.created).total_seconds()),
            "" if run.created is None or run.ended is None else duration((run.ended - run.created).total_seconds()),
            run.run_id,
        )
        for run in runs
    ]
    if not sys.stdout.isatty():
        print("\t".join(_COLUMNS))
        for line in cells:
            print("\t".join(plain(cell) for cell in line))
        return
    table = Table(box=None, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in {"age", "took"} else "left", no_wrap=column == "run id")
    for line in cells:
        table.add_row(*(escape(plain(cell)) for cell in line))
    Console(highlight=False).print(table)


def duration(seconds: float) -> str:
    """The largest unit that counts at least two: "90 s" is 90 s, "40 h" is 40 h."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def plain(text: str) -> str:
    """Without what would move a terminal's cursor; a line that was written over and over is shown in its parts."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def outcome(kubeflow: Kubeflow, config: RunConfig, run: RunView, steps: Sequence[Step]) -> tuple[str | None, str]:
    """What came of a run that succeeded, and a line about it: Kubeflow does not know that a gate refuses.

    MLflow knows it; where it cannot be asked from here, the steps' logs say it.

    Raises:
        RunError: the gate was asked, and what it said cannot be learnt, or something else is said of the run.
    """
    found: tuple[str, str] | None = None
    with suppress(UserError):
        found = _outcome_in_mlflow(config, run.run_id)
    if found is None:
        with suppress(UserError):
            found = _outcome_in_logs(kubeflow, run.run_id, steps)
    if found is not None and found[0] not in _GOOD:
        raise RunError(f"The run {run.name} has succeeded to Kubeflow, but is said to be {found[0]}", got=found[1])
    if found is not None:
        return found
    if any(step.name == _GATE_STEP and step.state == "SUCCEEDED" for step in run.steps):
        raise RunError(
            f"The run {run.name} has succeeded, but the gate's word is unknown: neither MLflow nor the log of "
            f"{_GATE_STEP} tells it here",
            fix=f"look in MLflow at the run whose tag dpo.kubeflow_run is {run.run_id}, or at `dpo logs CONFIG "
            f"{run.run_id} {_GATE_STEP}`",
        )
    return None, "the run succeeded, and registered nothing"


def _outcome_in_mlflow(config: RunConfig, run_id: str) -> tuple[str, str] | None:
    from dpo_train.tracking import patience, tracking_uri
    from dpo_train.tracking.search import Runs

    with patience():
        rows = Runs(tracking_uri(config)).find(
            config.tracking.experiment,
            kind="pipeline",
            where=f"tags.dpo.kubeflow_run = '{run_id}'",
            sort=None,
            limit=1,
        )
    tags = rows[0].tags if rows else {}
    if came_of := tags.get("dpo.outcome"):
        return came_of, tags.get("dpo.why", came_of)
    if tags.get("dpo.registered") == "false":
        return "refused", tags.get("dpo.refusal", "the gate refused the model")
    if version := tags.get("dpo.version"):
        return "registered", version
    return None


def _outcome_in_logs(kubeflow: Kubeflow, run_id: str, steps: Sequence[Step]) -> tuple[str, str] | None:
    from dpo_train.cluster.kubeflow.logs import read_log
    from dpo_train.cluster.kubeflow.runs import get

    run = get(kubeflow, run_id)
    for step in (step for name in _OUTCOME_STEPS for step in steps if step.name == name):
        with suppress(UserError):
            for line in reversed(plain(read_log(kubeflow, run, step)).splitlines()):
                if found := _outcome_line(line):
                    return found
    return None


def _outcome_line(line: str) -> tuple[str, str] | None:
    if not line.startswith(OUTCOME_MARK):
        return None
    try:
        found = json.loads(line.removeprefix(OUTCOME_MARK))
        return str(found["outcome"]), str(found["why"])
    except (ValueError, TypeError, KeyError):  # a line that was cut off, or somebody else's
        return None


def _took(step: StepView) -> str:
    if step.started is None:
        return ""
    end = step.ended.timestamp() if step.ended else time.time()
    return duration(end - step.started.timestamp())
