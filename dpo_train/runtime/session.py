"""Starting Ray, or attaching to one that runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.errors import MissingPackageError, RunError, first_line

ADDRESS_KEY = "RAY_ADDRESS"

_ENVIRONMENT = {
    # Says on every start that a default will change; we set the value ourselves.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Usage reports leave the machine; nobody was asked.
    "RAY_USAGE_STATS_ENABLED": "0",
    # A trial of a Tune sweep writes no files of its own; ours are in the store.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # Tune would take Ctrl-C for "stop here and go on with what there is".
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def import_ray() -> Any:
    """The ray module, configured.

    Raises:
        MissingPackageError: it is not installed.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import ray
        import ray.data
        import ray.train
        import ray.tune
    except ImportError:
        raise MissingPackageError(
            "Ray is not installed", fix="pip install 'dpo-train[ray]', or set compute.executor=local"
        ) from None
    return ray


def attach() -> Any:
    """The ray module, connected: to RAY_ADDRESS if it is set, else to a Ray of this process's own.

    Raises:
        RunError: it does not answer, or does not start.
    """
    ray = import_ray()
    address = os.environ.get(ADDRESS_KEY)
    if not ray.is_initialized():
        try:
            with own_signals():
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    include_dashboard=None if address else False,
                )
        except Exception as error:  # Ray's own are bare ones
            said = first_line(error)
            if address:
                fix = f"start it with this version of Ray, or unset {ADDRESS_KEY}"
                raise RunError(f"Ray at {address} cannot be used", got=said, fix=fix) from error
            fix = (
                "look at its logs, session_latest/logs in /tmp/ray (or RAY_TMPDIR); compute.executor=local needs no Ray"
            )
            raise RunError("Ray does not start on this machine", got=said, fix=fix) from error
    return ray


def num_gpus(compute: ComputeConfig) -> float:
    """GPUs of the cluster that this run may use."""
    return float(attach().cluster_resources().get("GPU", 0)) if compute.device != "cpu" else 0.0


@contextmanager
def own_signals() -> Iterator[None]:
    """Keeps this process's handlers of SIGINT and SIGTERM: Ray puts its own in their place, which exit or abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for this process and its children, started once; its address is handed on by RAY_ADDRESS."""
    if os.environ.get(ADDRESS_KEY):
        yield
        return
    ours = not import_ray().is_initialized()  # in a notebook the user may have started it
    ray = attach()
    os.environ[ADDRESS_KEY] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS_KEY, None)
        if ours:
            ray.shutdown()
