"""What to do about an error that came out of Ray. Pure."""

from __future__ import annotations

from enum import Enum

from dpo_train.errors import (
    DpoError,
    LostPeerError,
    OutOfMemoryError,
    PreemptedError,
    WorkerError,
    first_line,
    is_out_of_memory,
)


class Decision(Enum):
    """RETRY: another attempt may succeed (a lost worker). RAISE: it would fail the same way."""

    RETRY = "retry"
    RAISE = "raise"


def decide(error: BaseException) -> Decision:
    """Errors raised on purpose, and bugs, repeat themselves; a lost process or connection does not."""
    if isinstance(error, PreemptedError | LostPeerError):
        return Decision.RETRY
    if isinstance(error, DpoError):
        return Decision.RAISE
    # What a rank meets when another one dies: torch's own kinds for NCCL, a plain RuntimeError for gloo.
    lost_peer = type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"}
    lost_peer |= isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    # Ray takes the survivors' process group away before it ends them.
    lost_peer |= isinstance(error, ValueError) and "process group has not been initialized" in str(error)
    transient = isinstance(error, ConnectionError | TimeoutError | EOFError)
    return Decision.RETRY if lost_peer or transient else Decision.RAISE


def known_error(error: Exception, where: str) -> DpoError:
    """The error itself if it is one of ours, else one of ours that names it. It can be pickled."""
    if isinstance(error, DpoError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error, where)
    return WorkerError(f"{where}: {type(error).__name__}: {error}")


def out_of_memory(error: BaseException, where: str) -> OutOfMemoryError:
    """What to do about memory that was too small."""
    return OutOfMemoryError(f"{where}: memory ran out: {first_line(error)}", fix="lower train.row_tokens")


def cause_of(error: BaseException) -> BaseException:
    """The error that a worker raised, from under the wrappers that Ray puts around it."""
    seen: set[int] = set()
    current = error
    while id(current) not in seen:
        seen.add(id(current))
        inner = (
            getattr(current, "cause", None)
            or getattr(current, "base_exc", None)
            or getattr(current, "_base_exc", None)
            or current.__cause__
        )
        if isinstance(current, DpoError) or not isinstance(inner, BaseException):
            break
        current = inner
    return current
