"""`dpo job`: the process of a stage that was launched elsewhere. It is started by a cluster, not by a person.

Standard output is the way back to whoever waits: each event is a line that begins with ``EVENT_MARK``, everything else
is a line as it is. ``result.json`` in the job's folder is written last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_train import launch, storage
from dpo_train.artifacts import open_artifact
from dpo_train.cli.processes import end_children
from dpo_train.cluster.job import EVENT_MARK, drop_result, read_job, write_result
from dpo_train.errors import DpoError
from dpo_train.progress import ENVIRONMENT_KEY, Follower

if TYPE_CHECKING:
    from dpo_train.cluster.job import Job
    from dpo_train.config import RunConfig

HELP = "run the stage that a job's folder describes; clusters start it, people need not"

FOLLOW_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's folder is all that a command line may hold: arguments are public."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of the job in the store, here or at s3://")


def job(arguments: argparse.Namespace) -> int:
    """Runs the stage and leaves what came of it in the job's folder.

    An interrupt, and SIGTERM is one, leaves no result: whoever ended the job knows why, and a result would be taken for
    the stage's own word. The result of an attempt before this one is dropped first.

    Raises:
        StoreError: there is no such job, or the store cannot be reached; that is no word of the stage either.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = arguments.folder if storage.is_remote(arguments.folder) else str(Path(arguments.folder).absolute())
    found = read_job(folder)
    launch.use_storage(found.config)
    drop_result(found)
    try:
        with _events_as_lines():
            address = _make(found)
    except (KeyboardInterrupt, SystemExit):
        print("Interrupted. Complete outputs are kept.", flush=True)
        return 130
    except Exception as error:
        if not isinstance(error, DpoError):
            traceback.print_exc()
        print(f"dpo: {error}", flush=True)
        write_result(found, error)
        return launch.exit_code(error)
    write_result(found, address)
    return 0


def _make(found: Job) -> str:
    """The address of the stage's output; what an earlier attempt has completed is reused."""
    store = found.config.store
    inputs = {name: open_artifact(storage.join(store, address)) for name, address in found.inputs.items()}
    with launch.session(found.config), end_children():
        config = _with_device(found.config)
        return launch.run_stage(found.stage, config, inputs, run_id=found.run_id, output=found.output).address


def _with_device(config: RunConfig) -> RunConfig:
    """The config with the device that the cluster's workers have: the machine that drives a job often has no GPU."""
    if config.compute.device != "auto" or config.compute.executor == "local":
        return config
    from dpo_train.runtime.session import num_gpus

    device: Literal["cpu", "cuda"] = "cuda" if num_gpus(config.compute) > 0 else "cpu"
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, device=device))


@contextmanager
def _events_as_lines() -> Iterator[None]:
    """Inside, events go to a file of this process, and from there to standard output as they come."""
    with tempfile.TemporaryDirectory(prefix="dpo-job-", ignore_cleanup_errors=True) as scratch:
        path = Path(scratch) / "events.jsonl"
        previous = os.environ.get(ENVIRONMENT_KEY)
        os.environ[ENVIRONMENT_KEY] = str(path)
        over = threading.Event()
        thread = threading.Thread(target=_print_events, args=(Follower(path), over), name="events", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if previous is None:
                del os.environ[ENVIRONMENT_KEY]
            else:
                os.environ[ENVIRONMENT_KEY] = previous


def _print_events(follower: Follower, over: threading.Event) -> None:
    while True:
        finished = over.wait(FOLLOW_SECONDS)
        for event in follower.new():
            # One write a line: other threads print too, and a line that is broken in two is no event.
            sys.stdout.write(f"{EVENT_MARK}{json.dumps(event)}\n")
        sys.stdout.flush()
        if finished:
            return
