"""Silence for libraries that talk on standard error while a person is shown something else."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TextIO


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, standard error leads nowhere: progress bars, warnings and the logs of databases are dropped.

    Both ways there: descriptor 2, and ``sys.stderr``, which a live display of rich leads elsewhere.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(_nowhere().fileno(), 2)
    try:
        with redirect_stderr(_nowhere()):
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@functools.cache
def _nowhere() -> TextIO:
    """Never closed: a library that is imported inside may log to it for good."""
    return Path(os.devnull).open("w", encoding="utf-8")
