"""Starting Ray, or attaching to one that runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_train.errors import MissingPackageError, RunError
from dpo_train.progress import ENVIRONMENT_KEY

ADDRESS_KEY = "RAY_ADDRESS"

_ENVIRONMENT = {
    # Says on every start that a default will change; we set the value ourselves.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Usage reports leave the machine; nobody was asked.
    "RAY_USAGE_STATS_ENABLED": "0",
    # A trial of a Tune sweep writes no files of its own; ours are in the store.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
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
    except ImportError:
        raise MissingPackageError(
            "Ray is not installed", fix="pip install 'dpo-train[ray]', or set compute.executor=local"
        ) from None
    return ray


def attach() -> Any:
    """The ray module, connected: to RAY_ADDRESS if it is set, else to a Ray of this process's own."""
    ray = import_ray()
    if not ray.is_initialized():
        events = os.environ.get(ENVIRONMENT_KEY)
        environment = {"env_vars": {ENVIRONMENT_KEY: events}} if events else {}
        try:
            ray.init(
                address=os.environ.get(ADDRESS_KEY) or "local",
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=None if os.environ.get(ADDRESS_KEY) else False,
            )
        except ConnectionError as error:
            raise RunError(
                f"Ray at {os.environ.get(ADDRESS_KEY)} does not answer",
                got=str(error).splitlines()[0],
                fix=f"start it, or unset {ADDRESS_KEY}",
            ) from error
    return ray


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for this process and its children, started once; its address is handed on by RAY_ADDRESS."""
    if os.environ.get(ADDRESS_KEY):
        yield
        return
    ray = attach()
    os.environ[ADDRESS_KEY] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS_KEY, None)
        ray.shutdown()
