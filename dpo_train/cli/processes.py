"""No process is left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

TERMINAL_SECONDS = 2
GRACE_SECONDS = 10
"""A stage needs about a second to mark its MLflow run and leave Ray."""


@contextmanager
def end_children() -> Iterator[None]:
    """Ends every child process that was started inside, if the block is left by an error or an interrupt.

    A termination counts as an interrupt. Enter it after Ray has started: Ray takes SIGTERM for itself, and aborts.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    except BaseException:
        # A second Ctrl-C must not leave half of them behind.
        kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        started = [child for child in psutil.Process().children() if child.pid not in before]
        families = [process for child in started for process in (child, *_descendants(child))]
        # A terminal sends Ctrl-C to all of them at once; a second one would cut off their own clearing up.
        _, alive = psutil.wait_procs(families, timeout=TERMINAL_SECONDS)
        _signal(alive, signal.SIGINT)
        _, alive = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
        _signal(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)
        for number, handler in kept.items():
            signal.signal(number, handler)
        raise


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
