"""`dpo submit`, `dpo cancel`, `dpo logs` and `dpo runs --kfp`: the pipeline on Kubeflow Pipelines."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_train import storage
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ConfigError, DpoError, RunError

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.client import Kubeflow
    from dpo_train.cluster.kubeflow.package import Package, Step
    from dpo_train.cluster.kubeflow.runs import RunView
    from dpo_train.cluster.kubeflow.submission import Submission

SUBMIT_HELP = "start the whole pipeline on Kubeflow Pipelines"
CANCEL_HELP = "end a run on Kubeflow Pipelines"
LOGS_HELP = "print what a step of a run on Kubeflow Pipelines has printed"

RUN_HELP = "id of the run, its beginning, or the run's name (`dpo runs CONFIG --kfp` lists them)"
CONTENT = ("experiment", "service_account", "image", "argument", "no_cache")
"""Options that say what is to run."""
LAST_LINES = 20
"""Of a failed step's log that are shown."""
REFUSED = 3


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("--name", help="name of the run (default: the config file's, with the time)")
    add_content_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="run `dpo doctor` and `dpo plan` first, and start nothing if one fails"
    )
    parser.add_argument("--wait", action="store_true", help="show the steps until the run ends, and exit as it ended")
    parser.add_argument(
        "--attach", metavar="RUN", help="start nothing, and wait for a run that is there: its id or name"
    )


def add_content_arguments(parser: argparse.ArgumentParser) -> None:
    """The options ``CONTENT``, for one run as for those of a schedule."""
    parser.add_argument("--experiment", help="instead of kubeflow.experiment")
    parser.add_argument("--service-account", metavar="NAME", help="of the tasks, instead of kubeflow.service_account")
    parser.add_argument("--image", help="of the tasks, best with its digest, instead of kubeflow.image")
    parser.add_argument("--no-cache", action="store_true", help="let Kubeflow skip no task whose inputs it has seen")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of another argument of the pipeline; may be repeated",
    )


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("step", metavar="STEP", help="prepare, train, ...")


def submit(arguments: argparse.Namespace) -> int:
    """Uploads the pipeline if this version is not there, starts a run and, if asked to, waits for it.

    Raises:
        UserError: a mistake in what was given; nothing was started.
        RunError: the run failed, or is not followed any more.
    """
    from dpo_train.cluster.kubeflow import submission as submissions
    from dpo_train.cluster.kubeflow.client import connect
    from dpo_train.cluster.kubeflow.login import address

    config = load_config(arguments.config, arguments.overrides)
    if arguments.attach is not None:
        refuse_options(arguments, ("name", *CONTENT), "the run that --attach names has started already")
        return _attach(config, arguments)
    where = address(config.kubeflow)
    if arguments.check:
        _check(config)
    submission = _submission(config, arguments)
    if config.tracking.uri is None and storage.is_remote(config.store):
        note = "tracking.uri is not set: Kubeflow's MLflow plugin, or MLFLOW_TRACKING_URI there, has to name MLflow"
        print(f"note: {note}", file=sys.stderr)
    kubeflow = connect(where, config.kubeflow)
    made = submissions.submit(kubeflow, submission, _tell)
    _tell(f"submitted {submission.name}: {made.run_id} ({submission.pipeline} {made.version.name})")
    _tell(kubeflow.link(made.run_id))
    return _follow(kubeflow, config, arguments.config, made.run_id, submission.package.steps) if arguments.wait else 0


def _check(config: RunConfig) -> None:
    """Raises:
    ConfigError: something is missing, or the run would not fit.
    """
    from dpo_train.cli.doctor import examine
    from dpo_train.cli.plan import check_fit

    if examine(config):
        raise ConfigError("A check fails: nothing was started", fix="mend what it says, or submit without --check")
    _tell(check_fit(config))


def cancel(arguments: argparse.Namespace) -> int:
    """Ends a run, or says how it had ended."""
    from dpo_train.cluster.kubeflow import runs

    kubeflow = _connect(load_config(arguments.config, arguments.overrides))
    run = runs.find(kubeflow, arguments.run)
    ended = runs.cancel(kubeflow, run)
    if ended is None:
        _tell(f"{run.display_name} ({run.run_id}) is being ended; what is complete stays in the store")
    else:
        _tell(f"{ended.name} ({ended.run_id}) had ended already: {ended.state.lower()}")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Prints the log to standard output."""
    from dpo_train.cli.kubeflow_show import plain
    from dpo_train.cluster.kubeflow import logs as reading
    from dpo_train.cluster.kubeflow import runs

    kubeflow = _connect(load_config(arguments.config, arguments.overrides))
    run = runs.find(kubeflow, arguments.run)
    step = runs.find_step(runs.package_of_run(kubeflow, run).steps, arguments.step)
    text = plain(reading.read_log(kubeflow, run, step))
    print(text, end="" if text.endswith("\n") or not text else "\n")
    return 0


def kubeflow_runs(config: RunConfig, limit: int) -> int:
    """Prints the newest runs of ``kubeflow.experiment`` as a table."""
    from dpo_train.cli.kubeflow_show import print_runs
    from dpo_train.cluster.kubeflow import runs

    if limit < 1:
        raise ConfigError("--limit must be at least 1", got=limit)
    kubeflow = _connect(config)
    found = runs.newest(kubeflow, config.kubeflow.experiment, limit)
    if found:
        print_runs(found)
    else:
        print(f"no runs yet in the experiment {config.kubeflow.experiment}")
    return 0


def compiled_pipeline() -> Package:
    """The pipeline that comes with this installation."""
    from dpo_train.cluster.kubeflow.package import load_package
    from pipelines.compile import PACKAGE

    return load_package(PACKAGE)


def parse_arguments(package: Package, given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` from the command line as values of the types that the pipeline wants.

    Raises:
        ConfigError: one has no "=".
    """
    from dpo_train.cluster.kubeflow.package import parse_argument
    from dpo_train.tracking import redacted

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError("--argument needs a name and a value", got=redacted(text), expected="NAME=VALUE")
        found[name] = parse_argument(package, name, value)
    return found


def refuse_options(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """An option that would have no effect is a mistake."""
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]:
        raise ConfigError(f"{', '.join(given)} has no effect here: {why}")


def default_name(config: Path) -> str:
    """The config file's name and the time, UTC, so that runs can be told apart."""
    return f"{config.stem}-{datetime.datetime.now(tz=datetime.UTC):%Y%m%d-%H%M%S}"


def _connect(config: RunConfig) -> Kubeflow:
    from dpo_train.cluster.kubeflow.client import connect
    from dpo_train.cluster.kubeflow.login import address

    return connect(address(config.kubeflow), config.kubeflow)


def _submission(config: RunConfig, arguments: argparse.Namespace) -> Submission:
    """Everything that can be checked without asking anybody."""
    from dpo_train.cluster.kubeflow.submission import prepare

    package = compiled_pipeline()
    return prepare(
        config,
        package,
        name=arguments.name or default_name(arguments.config),
        arguments=parse_arguments(package, arguments.argument),
        image=arguments.image,
        experiment=arguments.experiment,
        service_account=arguments.service_account,
        cache=not arguments.no_cache,
    )


def _attach(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Waits for a run that somebody has started, or that has ended already."""
    from dpo_train.cluster.kubeflow import runs

    kubeflow = _connect(config)
    run = runs.find(kubeflow, arguments.attach)
    steps = runs.package_of_run(kubeflow, run).steps
    _tell(kubeflow.link(run.run_id))
    return _follow(kubeflow, config, arguments.config, run.run_id, steps)


def _follow(kubeflow: Kubeflow, config: RunConfig, file: Path, run_id: str, steps: Sequence[Step]) -> int:
    """Waits for a run that has started; Ctrl-C ends the waiting alone."""
    try:
        return _wait(kubeflow, config, run_id, steps)
    except KeyboardInterrupt:
        ending = shlex.join(["dpo", "cancel", str(file), run_id])
        waiting = shlex.join(["dpo", "submit", str(file), "--attach", run_id])
        print(f"dpo: no longer waiting; the run goes on, and `{ending}` ends it; `{waiting}` waits on", file=sys.stderr)
        return 130


def _wait(kubeflow: Kubeflow, config: RunConfig, run_id: str, steps: Sequence[Step]) -> int:
    """Shows the steps until the run has ended.

    Raises:
        RunError: it failed, or was canceled, or what its gate said cannot be learnt.
    """
    from dpo_train.cli.kubeflow_show import Steps, outcome
    from dpo_train.cluster.kubeflow.following import follow

    with Steps() as display:
        ended = follow(kubeflow, run_id, steps, display.changed, display.tell)
    if ended.state == "FAILED":
        raise _failure(kubeflow, ended, steps)
    if ended.state != "SUCCEEDED":
        raise RunError(f"The run {ended.name} has ended without a result", got=ended.state.lower())
    came_of, why = outcome(kubeflow, config, ended, steps)
    if came_of == "refused":
        print(f"Refused. {why}")
        return REFUSED
    _tell(why)
    return 0


def _failure(kubeflow: Kubeflow, ended: RunView, steps: Sequence[Step]) -> RunError:
    """The error that ends the command; the last lines of what failed are printed at once."""
    from dpo_train.cli.kubeflow_show import plain
    from dpo_train.cluster.kubeflow import logs as reading
    from dpo_train.cluster.kubeflow import runs

    failed = [step for step in ended.steps if step.state == "FAILED"]
    for step in failed:
        try:
            run = runs.get(kubeflow, ended.run_id)
            lines = plain(reading.read_log(kubeflow, run, runs.find_step(steps, step.name))).splitlines()
        except DpoError as error:
            _tell(f"{step.name}: {error}")
            continue
        _tell(f"the last lines of {step.name}:")
        for line in lines[-LAST_LINES:]:
            _tell(f"  {line}")
    where = f" in {', '.join(step.name for step in failed)}" if failed else ""
    reason = next((step.error for step in failed if step.error), None) or ended.error
    return RunError(
        f"The run {ended.name} failed{where}",
        got=reason,
        fix="mend that and submit again: what is complete in the store is reused",
    )


def _tell(line: str) -> None:
    print(line, flush=True)
