"""The exception tree: every error a person can meet says what happened, what was got, what was expected, what to do.

Each class names its exit code, which is all that the command line needs to know:
2 for the user's mistake, 1 for a failed run, 3 for a complete run whose gate refused the model.
All of them survive pickling, because they cross process borders (Ray workers, pipeline steps).
"""

from __future__ import annotations

import json
from typing import Any


class DpoError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is the whole message, ready to print."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        parts = [what.rstrip(".") + "."]
        if got is not None:
            parts.append(f"Got: {got}.")
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if fix is not None:
            parts.append(f"What to do: {fix.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self))


def _rebuild(kind: type[DpoError], message: str) -> DpoError:
    # By name: with an OSError among the parents, kind.__new__ finds RuntimeError's first, which refuses its layout.
    layout = next(base for base in (OSError, ImportError, Exception) if issubclass(kind, base))
    error: DpoError = layout.__new__(kind)
    Exception.__init__(error, message)
    return error


class UserError(DpoError):
    """Something the user gave is wrong; nothing was started, nothing was lost."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration key is unknown, has a wrong type, or contradicts another."""


class DataError(UserError, ValueError):
    """Preference data cannot be read, or holds nothing to train on."""


class ModelError(UserError, ValueError):
    """A model folder or name cannot be loaded, or the model cannot be trained by this engine."""


class StoreError(UserError, OSError):
    """An output cannot be written or read: no permission, another config's folder, not complete."""


class MissingPackageError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class RunError(DpoError, RuntimeError):
    """A run that was started properly failed."""


class DiskFullError(RunError, OSError):
    """The disk filled up while an output was being written; the output does not count as complete."""


class StorageUnavailableError(RunError):
    """Object storage did not do what was asked, however often; the message names the address and the last error."""


class NonFiniteLossError(RunError, ArithmeticError):
    """The loss became NaN or infinite; the message names the step, the rank and the pairs."""


class PreemptedError(RunError):
    """The machine is about to be taken away; what was done is saved, and the same command goes on from there."""


class LostPeerError(RunError):
    """This rank is well, but another one cannot go on."""


class WorkerError(RunError):
    """A Ray worker died or raised an error of its own."""


class OutOfMemoryError(RunError):
    """The memory of a GPU, or of a machine, was too small."""


class NotLearnedError(RunError):
    """The trained policy does not prefer the chosen answers on held-out pairs: nothing is registered."""


class GateRefusedError(DpoError):
    """The run is complete, its report is written, and a rule of the gate refused the model."""

    exit_code = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's and Ray's errors are called so, and the rest is known by its words."""
    words = ("can't allocate memory", "not enough memory", "running low on memory")
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or any(text in str(error) for text in words)


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's words, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def encode(error: DpoError) -> str:
    """An error as text, for a file or a table that another process reads."""
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def decode(text: str) -> DpoError:
    """The error behind ``encode``'s text; a kind that is not defined here becomes a WorkerError."""
    content = json.loads(text)
    kind = globals().get(content["kind"])
    if not (isinstance(kind, type) and issubclass(kind, DpoError)):
        kind = WorkerError
    return _rebuild(kind, content["message"])
