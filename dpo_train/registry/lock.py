"""One process at a time changes what a model's aliases mean: MLflow's aliases have no compare-and-swap.

What is atomic in MLflow is the creation and the renaming of a registered model, whose name is unique. So the lock of
model ``m`` is a registered model ``m.lock``, created with the holder, a token and an expiry in one request:

    create m.lock               one of many succeeds; it holds the lock, and deletes it in the end
    m.lock is past its expiry   rename it to m.lock.expired-<its token>, then create: two takers rename to the same
                                name, so one of them fails, also where it comes late and the lock is another's

The expired lock stays for KEEP_SECONDS under its new name, because it is this name that stops a late taker. The clocks
of all who promote must agree within MARGIN_SECONDS / 3; a holder writes nothing in its lease's last MARGIN_SECONDS.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from dpo_train.errors import RunError, UserError, first_line

LEASE_SECONDS = 90.0
MARGIN_SECONDS = 60.0
"""A request with its repetition (REQUEST_SECONDS each, and a pause) and 20 s between two clocks."""
REQUEST_SECONDS = 15
KEEP_SECONDS = 3600.0
POLL_SECONDS = 0.5
GIVE_UP_SECONDS = 30.0
"""Over what may be waited for another holder: of a lock that nobody holds and that still cannot be had."""

_LOG = logging.getLogger(__name__)
_HOLDER, _TOKEN, _SINCE, _EXPIRES = "dpo.lock.holder", "dpo.lock.token", "dpo.lock.since", "dpo.lock.expires"
_EXISTS = {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"}
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}


class LockedError(RunError):
    """Another process changes this model's aliases right now, or took over the lock that this one had."""


@contextmanager
def locked(
    client: Any, name: str, *, wait_seconds: float = 0.0, lease_seconds: float = LEASE_SECONDS
) -> Iterator[Callable[[], None]]:
    """Holds the lock of a registered model.

    Args:
        wait_seconds: how long to wait for another holder; 0: not at all.
        lease_seconds: after which others take the lock for abandoned.

    Yields:
        a function to call before each write: it raises once too little of the lease is left.

    Raises:
        LockedError: it is held by another, whom the message names.
        RunError: nobody holds it, and still the server does not give it.
        UserError: there is a registered model of the lock's name that is no lock.
    """
    token = uuid.uuid4().hex[:16]
    with _patience():
        expires = _acquire(client, name, token, wait_seconds, lease_seconds)

        def check() -> None:
            if time.time() > expires - min(MARGIN_SECONDS, lease_seconds * 2 / 3):
                raise LockedError(
                    f"This took longer than the {lease_seconds:g} s for which {name} was locked, and others may go on",
                    fix="see what the aliases are now (`dpo ui`), and run the command again",
                )

        try:
            yield check
        finally:
            with suppress(LockedError):
                check()  # past it the lock may be another's already, and is not ours to delete
                _release(client, name)


def lock_name(name: str) -> str:
    """The registered model that stands for the lock."""
    return f"{name}.lock"


def error_code(error: BaseException) -> str:
    """MLflow's own word for what went wrong; empty for other errors."""
    return str(getattr(error, "error_code", ""))


def _acquire(client: Any, name: str, token: str, wait_seconds: float, lease_seconds: float) -> float:
    deadline = time.monotonic() + wait_seconds
    while True:
        now = time.time()
        tags = {_HOLDER: _me(), _TOKEN: token, _SINCE: str(now), _EXPIRES: str(now + lease_seconds)}
        # Absent: it was there, and was gone when the server looked for what to say of it.
        if _did(_EXISTS | ABSENT, client.create_registered_model, lock_name(name), tags):
            return now + lease_seconds
        found = _read(client, name)
        if found is not None and found[_TOKEN] == token:
            return float(found[_EXPIRES])  # the answer to our request was lost, and it was sent again
        if found is not None and float(found[_EXPIRES]) >= time.time():
            if time.monotonic() >= deadline:
                raise _held(name, found)
            time.sleep(POLL_SECONDS)
        elif time.monotonic() >= deadline + GIVE_UP_SECONDS:
            raise RunError(
                f"{name} cannot be locked: MLflow does not make {lock_name(name)}, and nobody holds it",
                fix="see that the address is that of an MLflow server with a model registry, and run the command again",
            )
        elif found is None:
            time.sleep(POLL_SECONDS)  # released since
        else:
            _put_aside(client, name, found[_TOKEN])


def _held(name: str, tags: Mapping[str, str]) -> LockedError:
    since = datetime.fromtimestamp(float(tags[_SINCE]), UTC)
    left = float(tags[_EXPIRES]) - time.time()
    return LockedError(
        f"The aliases of {name} are being changed by {tags[_HOLDER]} since {since:%Y-%m-%d %H:%M:%S} UTC",
        fix=f"run the command again; should that process be gone, its lock expires in {max(left, 0):.0f} s",
    )


def _put_aside(client: Any, name: str, token: str) -> None:
    """Makes room in the place of an expired lock, unless another is quicker."""
    try:
        client.rename_registered_model(lock_name(name), _expired_name(name, token))
    except Exception:
        # Two renames at once may fail in more ways than by the names: what counts is whether that lock is gone.
        found = _read(client, name)
        if found is not None and found[_TOKEN] == token:
            raise


def _read(client: Any, name: str) -> Mapping[str, str] | None:
    """The lock's tags; None: there is no lock."""
    try:
        tags: Mapping[str, str] = client.get_registered_model(lock_name(name)).tags
    except Exception as error:
        if error_code(error) in ABSENT:
            return None
        raise
    if _EXPIRES not in tags:
        raise UserError(
            f"There is a registered model {lock_name(name)} that is no lock of ours, so {name} cannot be locked",
            fix="rename that model, or set another register.model_name",
        )
    return tags


def _did(expected: set[str], request: Callable[..., object], *arguments: Any) -> bool:
    """Whether the server did it; False: an expected reason was against it."""
    try:
        request(*arguments)
    except Exception as error:
        if error_code(error) in expected:
            return False
        raise
    return True


def _expired_name(name: str, token: str) -> str:
    return f"{lock_name(name)}.expired-{token}"


def _release(client: Any, name: str) -> None:
    """As well as may be: what was done under the lock is done, and an error there must come through."""
    try:
        _did(ABSENT, client.delete_registered_model, lock_name(name))
        _clear(client, name)
    except Exception as error:
        _LOG.warning("A lock of %s is left in MLflow and expires by itself: %s", name, first_line(error))


def _clear(client: Any, name: str) -> None:
    """Deletes what is left of locks that expired long ago."""
    prefix = _expired_name(name, "")
    for found in client.search_registered_models(f"name LIKE '{prefix}%'"):
        if found.name.startswith(prefix) and float(found.tags.get(_EXPIRES, "inf")) + KEEP_SECONDS < time.time():
            _did(ABSENT, client.delete_registered_model, found.name)


def _me() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user often has no name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()} (process {os.getpid()})"


@contextmanager
def _patience() -> Iterator[None]:
    """Requests that end well before the lease does: by default MLflow tries for many minutes."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS)}
    with kept_variables(*wanted):
        os.environ.update(wanted)
        yield


@contextmanager
def kept_variables(*names: str) -> Iterator[None]:
    """Environment variables, which afterwards are again what they were."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
