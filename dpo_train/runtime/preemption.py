"""A machine that is about to be taken away: Ray's notice that a node is draining, or SIGTERM to a training worker."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ray.train import get_preemption_info
from ray.train.torch import TorchConfig

_terminated = threading.Event()


class ListeningTorchConfig(TorchConfig):  # type: ignore[misc] # Ray ships no types
    """Sets up torch's process group, and then has every worker listen for SIGTERM."""

    @property
    def backend_cls(self) -> Any:
        return _backend(super().backend_cls)


def is_preempted() -> bool:
    """Whether this worker, or a node of the training, will go soon. All ranks must ask the same number of times."""
    return get_preemption_info() is not None or _terminated.is_set()


def _backend(base: Any) -> Any:
    class Backend(base):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_start(worker_group, backend_config)
            worker_group.execute(listen)

    return Backend


def listen() -> None:
    """Runs in a worker's main thread, the only one that may handle signals; the training runs in another.

    Ray's own handler would end the process at once. A second SIGTERM still does.
    """
    default = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        del number, frame
        _terminated.set()
        signal.signal(signal.SIGTERM, default)

    signal.signal(signal.SIGTERM, note)
