"""What each command does. Heavy imports stay inside, so that ``dpo --help`` is instant."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from dpo_train import launch, storage
from dpo_train.artifacts import Artifact, local_copy, open_artifact
from dpo_train.cli import templates
from dpo_train.cli.console import Display
from dpo_train.cli.garbage import collect_garbage
from dpo_train.cli.processes import end_children
from dpo_train.config import RunConfig, load_config, to_dict, to_text
from dpo_train.errors import ConfigError, DpoError, GateRefusedError, MissingPackageError, StoreError
from dpo_train.runs import RunFolder


def version() -> str:
    """Name and version for ``dpo --version``."""
    return f"dpo {importlib.metadata.version('dpo-train')}"


def run(arguments: argparse.Namespace) -> int:
    """The compiled Kubeflow pipeline on this machine."""
    config = load(arguments)
    if "python3" in arguments.name or "{{$" in arguments.name:
        raise ConfigError("kfp.local damages this run name", got=arguments.name, fix="leave out 'python3' and '{{$'")
    launch.check_inputs(config)
    launch.check_tracking(config)
    config = launch.resolve_device(config)

    def work(display: Display) -> None:
        from pipelines.local import run_local

        own_ray = config.compute.executor == "ray" and config.cluster.launcher == "none"
        display.note(f"starting {'Ray' if own_ray else 'the pipeline'} ...")
        with launch.session(config), end_children():
            run_local(to_text(config), arguments.name)

    return watched(config, work, _ui_command(arguments))


def stage(arguments: argparse.Namespace) -> int:
    """One stage in this process. Inputs that were not named are made, or reused, first."""
    config = launch.resolve_device(load(arguments))
    launch.check_store(config, _absolute(arguments.output) if arguments.output else None)
    launch.check_tracking(config)
    if arguments.stage == "prepare":
        launch.check_inputs(config)
    given = {
        name: open_artifact(_absolute(path), name)
        for name in launch.INPUTS
        if (path := getattr(arguments, f"from_{name}", None)) is not None
    }
    if "sft" in given and not config.sft.enabled:
        raise ConfigError("--sft names an output that nothing would read", got="sft.enabled=false", fix="leave it out")

    def work(display: Display) -> None:
        del display
        with launch.session(config), end_children():
            _make(arguments.stage, config, given, arguments.output)

    return watched(config, work, _ui_command(arguments))


def _make(stage_name: str, config: RunConfig, made: dict[str, Artifact], output: str | None) -> Artifact:
    """The stage after everything it reads."""
    names = launch.needed(stage_name, config)
    for needed in names:
        if needed not in made:
            made[needed] = _make(needed, config, made, None)
    target = _absolute(output) if output else None
    inputs = {name: made[name] for name in names}
    return launch.run_stage(stage_name, config, inputs, output=target)


def compile_pipeline(arguments: argparse.Namespace) -> int:
    """Writes the Kubeflow pipeline."""
    try:
        from pipelines.compile import compile_pipeline as compile_to

        print(compile_to(arguments.output))
    except ImportError:
        raise MissingPackageError("Kubeflow Pipelines is not installed", fix="pip install 'dpo-train[kfp]'") from None
    except ValueError as error:
        raise ConfigError(str(error), fix="name a file that ends in .yaml") from None
    except OSError as error:
        raise StoreError(f"{arguments.output} cannot be written: {error.strerror}") from None
    return 0


def ui(arguments: argparse.Namespace) -> int:
    """MLflow's pages over the config's tracking store. This process becomes the server."""
    from dpo_train.tracking import redacted, tracking_uri

    config = load(arguments)
    uri = tracking_uri(config)
    if uri.startswith("http"):
        print(f"MLflow runs at {redacted(uri)}")
    else:
        _become_server(arguments, uri, redacted(uri))
    return 0


def _become_server(arguments: argparse.Namespace, uri: str, shown: str) -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise MissingPackageError("MLflow is not installed", fix="pip install 'dpo-train[mlflow]'")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise StoreError(f"There are no runs yet in {shown}", fix=f"dpo run {arguments.config}")
    print(f"http://127.0.0.1:{arguments.port} shows {shown} (Ctrl-C ends it)", flush=True)
    # In the environment, not among the arguments: the address may hold a password, and arguments are public.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(arguments.port)]
    os.execve(command[0], command, environment)  # noqa: S606 - our own interpreter, no shell


def show_config(arguments: argparse.Namespace) -> int:
    """The resolved config, as YAML that can be read back."""
    print(yaml.safe_dump(to_dict(load(arguments)), sort_keys=False), end="")
    return 0


def init(arguments: argparse.Namespace) -> int:
    """A commented config; an existing file is left alone."""
    try:
        with arguments.path.open("x", encoding="utf-8") as stream:
            stream.write(templates.commented_config())
    except FileExistsError:
        raise ConfigError(f"{arguments.path} exists already", fix="name another file") from None
    except OSError as error:
        raise StoreError(f"{arguments.path} cannot be written: {error.strerror}") from None
    print(f"wrote {arguments.path}: set model.path and prepare.path in it, then `dpo run {arguments.path}`")
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Outputs that no run refers to."""
    store = load(arguments).store
    if storage.is_remote(store):
        raise StoreError(
            f"What others use of {store} cannot be seen from here",
            expected="a store in a folder",
            fix="remove outputs by hand, or by a lifecycle rule of the bucket",
        )
    return collect_garbage(Path(store), keep_runs=arguments.keep_runs, remove=arguments.remove)


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else str(Path(path).absolute())


def load(arguments: argparse.Namespace) -> RunConfig:
    """The config that a command was given."""
    config = load_config(arguments.config, arguments.overrides)
    launch.use_storage(config)
    return config


def watched(config: RunConfig, work: Callable[[Display], None], ui_command: str) -> int:
    """Does the work with progress on the terminal and everything else in a log file.

    Args:
        ui_command: what to type to browse its runs.
    """
    # A terminated run ends as an interrupted one does: children and Ray first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Display(RunFolder.create(local_copy(config.store))) as display:
        try:
            work(display)
            display.stop()
            if display.refused:
                raise GateRefusedError(display.refused)
        except BaseException as error:
            display.stop()
            code = _explain(error, display)
            _close_run(config, display, error)
            return code
        display.summary(ui_command)
    return 0


def _close_run(config: RunConfig, display: Display, error: BaseException) -> None:
    """MLflow must not show a run as running that is not; a stage that was killed could not say so itself."""
    if display.run_id is None:
        return
    try:
        launch.close_run(config, display.run_id, error)
    except DpoError as second:
        display.note(f"its MLflow run stays open: {second}")


def _ui_command(arguments: argparse.Namespace) -> str:
    """The command that shows this very store, as it can be typed here."""
    program = "dpo" if shutil.which("dpo") else sys.argv[0]
    relevant = [text for text in arguments.overrides if text.startswith(("store=", "tracking."))]
    return shlex.join([program, "ui", str(arguments.config), *relevant])


def _explain(error: BaseException, display: Display) -> int:
    """Says what went wrong, in the failed stage's own words where it left some, and returns the exit code."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        display.print("[bold]Interrupted.[/] Complete outputs are kept; the same command continues from them.")
        return 130
    told = display.failure
    stage_name = told["stage"] if told else display.stage
    if isinstance(error, DpoError):
        code, message = error.exit_code, str(error)
    elif told is not None and told["known"]:
        # kfp.local only says that a task failed; the task's own error came through its events.
        code, message = int(told["exit_code"]), told["message"]
    elif told is None and stage_name:
        display.log_traceback(error)
        code, message = 1, "Its process ended without a word: it was killed (out of memory?), or the log says why."
    else:
        display.log_traceback(error)
        kind, text = (told["error"], told["message"]) if told else (type(error).__name__, str(error))
        code, message = 1, f"{kind}: {_plain(text)}"
    if code == 3:
        display.print_table()
    display.fail(stage_name, message, code)
    if code in {1, 3}:
        display.print_report()
    return code


def _plain(text: str) -> str:
    """Without the colours that kfp puts into its messages."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
