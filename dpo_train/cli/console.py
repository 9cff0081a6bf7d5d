"""What a person sees while stages run, and at the end. Everything that libraries print goes to the run's log file."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dpo_train.artifacts import open_artifact
from dpo_train.progress import ENVIRONMENT_KEY, Follower
from dpo_train.report_file import REPORT_JSON, read_report
from dpo_train.runs import RunFolder

REFRESH_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Without a terminal, progress is a line every so often."""
SHOWN_SAMPLES = 3
"""The report has them all."""


class Display:
    """Follows the events of a run. Inside ``with``, descriptors 1 and 2 lead to the log, also in child processes."""

    def __init__(self, folder: RunFolder) -> None:
        self.failure: dict[str, Any] | None = None
        self.run_id: str | None = None
        self.stage = ""
        self._folder = folder
        self._ends: list[dict[str, Any]] = []
        self._follower = Follower(folder.events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="display", daemon=True)

    def __enter__(self) -> Display:
        _flush()
        self._saved = os.dup(1), os.dup(2)
        self._console = Console(file=os.fdopen(os.dup(1), "w", encoding="utf-8"), highlight=False)
        log = os.open(self._folder.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self._previous = os.environ.get(ENVIRONMENT_KEY)
        os.environ[ENVIRONMENT_KEY] = str(self._folder.events)
        self._bars = _Bars(self._console) if self._console.is_terminal else _Lines(self._console)
        self.note(f"log: {self._folder.log}")
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._console.file.flush()
        _flush()  # what Python still holds back belongs in the log as well
        for saved, number in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, number)
            os.close(saved)
        if self._previous is None:
            os.environ.pop(ENVIRONMENT_KEY, None)
        else:
            os.environ[ENVIRONMENT_KEY] = self._previous

    def stop(self) -> None:
        """Shows what is left to show and ends the bars."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._bars.stop()

    @property
    def refused(self) -> str | None:
        """Why the gate let nothing be registered."""
        version = self._end_of("register")
        return None if version is None else version["refused"]

    def print(self, text: Any) -> None:
        self._console.print(text)

    def note(self, text: str) -> None:
        # Soft wrap: a path that is broken in two cannot be copied.
        self._console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)

    def fail(self, stage: str, message: str, code: int) -> None:
        """The one message of a command that did not succeed."""
        where = f" in {stage}" if stage else ""
        title = "[bold yellow]Refused.[/]" if code == 3 else f"[bold red]Failed{where}.[/]"
        self._console.print(f"{title} {escape(message)}", soft_wrap=True)
        self.note(f"all that was printed: {self._folder.log}")

    def log_traceback(self, error: BaseException) -> None:
        """An error that nobody expected is a bug: its traceback belongs in the log, if that can be written."""
        try:
            with self._folder.log.open("a", encoding="utf-8") as stream:
                traceback.print_exception(error, file=stream)
        except OSError as second:
            self.note(f"the log cannot be written: {second}")

    def summary(self, ui_command: str) -> None:
        """The end of a successful command."""
        self.print_table()
        if (data := self._end_of("prepare")) and not data["reused"]:
            self.note(f"the data: {data['path']}/report.html; what was not used: {data['path']}/rejections.jsonl")
        self.print_report()
        version = self._end_of("register")
        if version:
            self._console.print(f"\nregistered: [bold]{escape(version['summary'])}[/]", soft_wrap=True)
            self._console.print(f"to browse runs, metrics and the model: [bold]{escape(ui_command)}[/]", soft_wrap=True)

    def print_report(self) -> None:
        """Held-out numbers and samples, if the evaluation got that far."""
        end = self._end_of("evaluate")
        if end is None:
            return
        report = read_report(open_artifact(end["path"]).file(REPORT_JSON).parent)
        self._console.print("\nheld-out pairs (95 % interval)")
        for name in ("accuracy", "margin"):
            self._console.print(f"  {name:10s} {_estimate(report['findings']['heldout'][name])}")
        if not report["verdict"]["passed"]:
            self._console.print()
            self._console.print(_rule_table(report["verdict"]["rules"]))
        if report["samples"]:
            self._console.print()
            self._console.print(_sample_table(report["samples"][:SHOWN_SAMPLES]))
        self.note(f"report: {end['path']}/report.html")

    def print_table(self) -> None:
        """The stages that ended: time, whether they ran, what came out and where it lies."""
        if not self._ends:
            return
        table = Table(title="stages", title_justify="left")
        for column in ("stage", "time", "", "what came out", "output"):
            table.add_column(column, overflow="fold")
        stores = set()
        for end in self._ends:
            seconds = f"{end['seconds']:.0f} s"
            state = "reused" if end["reused"] else "run"
            # The address stays whole on a narrow terminal; the store it lies in is said once.
            stored = end["path"].endswith("/" + end["address"])
            if stored:
                stores.add(end["path"].removesuffix("/" + end["address"]))
            where = end["address"] if stored else end["path"]
            table.add_row(end["stage"], seconds, state, end["summary"], where)
        self._console.print(table)
        for store in stores:
            self.note(f"outputs lie in {store}")

    def _end_of(self, stage: str) -> dict[str, Any] | None:
        return next((end for end in self._ends if end["stage"] == stage), None)

    def _follow(self) -> None:
        while True:
            finished = self._stop.wait(REFRESH_SECONDS)
            for event in self._follower.new():
                self._take(event)
            if finished:
                return

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "end":
            self._ends.append(event)
        elif kind == "error":
            self.failure = event
        elif kind == "run":
            self.run_id = event["run_id"]
            return
        self.stage = event["stage"] if kind != "end" else ""
        self._bars.take(event)


class _Bars:
    """A live bar per stage."""

    def __init__(self, console: Console) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.fields[title]:28s}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def take(self, event: dict[str, Any]) -> None:
        stage, kind = event["stage"], event["kind"]
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task("", total=None, title=stage, count="", numbers="")
        task = self._tasks[stage]
        if kind == "progress":
            rate = self._progress.tasks[task].speed or 0.0
            numbers = _numbers(event, rate)
            # A trial, or the samples after the scores, counts from the start again.
            if event["done"] < self._progress.tasks[task].completed:
                self._progress.reset(task, total=event["total"])
            self._progress.update(
                task,
                total=event["total"],
                completed=event["done"],
                count=f"{event['done']:g}/{event['total']:g} {event['unit']}",
                numbers=numbers,
            )
        elif kind == "message":
            if len(event["text"]) < 30:
                self._progress.update(task, title=f"{stage}: {escape(event['text'])}")
            else:
                self._progress.console.print(f"[dim]{stage}: {escape(event['text'])}[/]", soft_wrap=True)
        elif kind == "end":
            done = "reused" if event["reused"] else "done"
            self._progress.update(task, title=stage, total=1, completed=1, count=done, numbers=escape(event["summary"]))
        elif kind == "error":
            self._progress.update(task, title=f"[red]{stage}[/]", total=1, count="failed", numbers="")


class _Lines:
    """The same for a file or a pipe: a line when something begins, moves or ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._done = 0.0
        self._first: tuple[float, float] | None = None

    def start(self) -> None:
        """Nothing to set up."""

    def stop(self) -> None:
        self._console.file.flush()

    def take(self, event: dict[str, Any]) -> None:
        stage, kind = event["stage"], event["kind"]
        text = ""
        if kind == "start":
            text, self._last, self._first = "started", event["time"], None
        elif kind == "message":
            text = event["text"]
        elif kind == "end":
            text = f"{'reused' if event['reused'] else 'done'} after {event['seconds']:.1f} s: {event['summary']}"
        elif kind == "progress":
            text = self._progress(event)
        if text:
            self._console.print(f"{stage:16s} {escape(text)}", soft_wrap=True)
            self._console.file.flush()

    def _progress(self, event: dict[str, Any]) -> str:
        """A line every LINE_SECONDS and at the end.

        The rate counts from the first progress on: before that, workers were loading their model. It starts anew where
        the counting does (a trial, another unit).
        """
        done, total, now = event["done"], event["total"], event["time"]
        if not done or done < self._done:
            self._first = None
        self._done = done
        if done and self._first is None:
            self._first = done, now
        if now - self._last < LINE_SECONDS and done != total:
            return ""
        self._last = now
        first_done, first_time = self._first or (done, now)
        rate = (done - first_done) / (now - first_time) if now > first_time else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        return f"{done:g}/{total:g} {event['unit']}{left}  {_numbers(event, rate)}".rstrip()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _numbers(event: dict[str, Any], rate: float) -> str:
    """Pairs per second, and loss and margin where there are some."""
    metrics = event["metrics"]
    parts = []
    if pairs_per_second := metrics.get("pairs_per_second") or (rate if event["unit"] == "pairs" else 0):
        parts.append(f"{pairs_per_second:.1f} pairs/s")
    for name, short in (("loss", "loss"), ("rewards/margin", "margin"), ("rewards/accuracy", "accuracy")):
        if name in metrics:
            parts.append(f"{short} {metrics[name]:.3f}")
    return "  ".join(parts)


def _estimate(found: dict[str, Any]) -> str:
    """Value, interval and n of an estimate in report.json."""
    value, low, high = ("?" if found[end] is None else f"{found[end]:.3f}" for end in ("value", "low", "high"))
    return f"{value}  ({low} to {high}, n = {found['n']})"


def _rule_table(rules: list[dict[str, Any]]) -> Table:
    """What the gate said, rule by rule."""
    table = Table(title="the gate", title_justify="left")
    for column in ("rule", "", "limit", "found (95 % interval)", "why"):
        table.add_column(column, overflow="fold")
    for rule in rules:
        found = _estimate(rule["found"]) if rule["found"] else ""
        cells = (rule["rule"], rule["outcome"].replace("_", " "), rule["limit"], found, rule["reason"])
        table.add_row(*(escape(printable(cell)) for cell in cells))
    return table


def _sample_table(samples: list[dict[str, Any]]) -> Table:
    """The answers of reference, policy and, if there is one, champion."""
    names = [name for name in ("reference", "policy", "champion") if any(name in s["answers"] for s in samples)]
    table = Table(title="samples on held-out prompts", title_justify="left", show_lines=True)
    for name in ("prompt", *names):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples:
        # Control characters of a model's answer must not reach the terminal.
        texts = (sample["prompt"], *(sample["answers"].get(name, "") for name in names))
        table.add_row(*(escape(printable(text)) for text in texts))
    return table


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
