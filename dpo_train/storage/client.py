"""The options of this process, its one client, and ``ask``: the only place that retries.

s3fs gives the session, the credentials and an event loop in a thread of its own. botocore's retries are off and s3fs's
are passed by, so that ``attempts`` means what it says. Only aiohttp sends a GET or PUT once more, at once, when the
connection breaks before an answer begins: a kept connection may have ended unnoticed, and that is no failed attempt.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dpo_train.errors import DpoError, MissingPackageError, StorageUnavailableError, StoreError
from dpo_train.storage import failures

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # without one byte
SLOWEST_BYTES_PER_S = 16 * 1024  # a body that drips slower than this is given up, and so tried again
CONNECTIONS = 32  # several files at a time, each in several parts


@dataclass(frozen=True, kw_only=True)
class Options:
    """How this process reaches object storage. Credentials are never here: environment, profile or role have them."""

    endpoint: str | None = None
    """Address of an S3 server that is not Amazon's; None: AWS_ENDPOINT_URL."""
    region: str | None = None
    """None: AWS_REGION, else AWS_DEFAULT_REGION."""
    anonymous: bool = False
    attempts: int = 6
    """How often a request is tried before the run fails."""
    cache: str | None = None
    """Folder for local copies; None: DPO_CACHE, else ~/.cache/dpo."""


@dataclass
class _Process:
    """What belongs to this process alone."""

    options: Options
    lock: threading.Lock
    client: Any = None
    made_for: tuple[object, ...] = ()


_process = _Process(Options(), threading.Lock())
_inherited: list[Any] = []


def _after_fork() -> None:
    """A child has neither the parent's event loop nor a right to its connections: closing them would disturb it."""
    global _process  # noqa: PLW0603  # one client per process is the point
    _inherited.append(_process.client)
    _process = _Process(_process.options, threading.Lock())


os.register_at_fork(after_in_child=_after_fork)


def use(options: Options) -> None:
    """Sets the options of this process. Every process calls it: the driver, Ray's workers."""
    _process.options = options


def options() -> Options:
    """The options of this process."""
    return _process.options


def cache_folder() -> Path:
    """The folder for local copies of what lies in object storage."""
    return Path(_process.options.cache or os.environ.get("DPO_CACHE") or "~/.cache/dpo").expanduser()


def ask(
    action: str,
    path: str,
    question: Callable[[Any], Awaitable[T]],
    *,
    attempts: int | None = None,
    limit_s: float | None = None,
) -> T:
    """Asks the server and returns its answer; what may pass is tried again with growing pauses.

    Args:
        action: a verb for messages, such as "read".
        question: takes the (asynchronous) botocore client; called once for each attempt.
        attempts: how often at most; default: the options' number.
        limit_s: seconds for one attempt; default: no limit but the time-outs.

    Raises:
        StoreError: refused in a way that would repeat itself.
        StorageUnavailableError: failed that often.
    """
    total = options().attempts if attempts is None else attempts
    for failed in range(1, total + 1):
        try:
            return _once(question, limit_s)
        except DpoError:
            raise
        except Exception as error:
            if not failures.is_foreign(error):
                raise
            if not failures.may_pass(error):
                raise failures.refusal(error, action, path, anonymous=options().anonymous) from error
            if failed == total:
                raise StorageUnavailableError(
                    f"Could not {action} {path} at {_server()} in {total} attempts",
                    got=failures.described(error),
                    fix="check that the server is up and storage.endpoint is right, and run the same command again",
                ) from error
            time.sleep(failures.pause_s(failed, random.random()))  # noqa: S311  # spreads load, no secret
    raise AssertionError("attempts is at least 1")


def _once(question: Callable[[Any], Awaitable[T]], limit_s: float | None) -> T:
    filesystem = _filesystem()
    from fsspec.asyn import sync  # type: ignore[import-untyped]

    async def call() -> T:
        return await question(await filesystem.set_session())

    answer: T = sync(filesystem.loop, call, timeout=limit_s)
    return answer


def package() -> Any:
    """s3fs itself."""
    try:
        import s3fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError("s3:// needs s3fs", fix="pip install 'dpo-train[s3]'") from error
    return s3fs


def in_threads(work: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """Does all of this, a few at a time, and returns the results in order. After a failure the rest does not start."""
    pool = ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(one) for one in work]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((future for future in futures if future in done and future.exception()), None)
        return [future.result() for future in ([failed] if failed else futures)]
    finally:
        pool.shutdown(cancel_futures=True)


def _filesystem() -> Any:
    """s3fs's file system for the current options and environment, made anew when one of them changes."""
    current = _process.options
    region = current.region or os.environ.get("AWS_REGION")
    environment = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    made_for = (current, CONNECT_TIMEOUT_S, READ_TIMEOUT_S, *environment)
    with _process.lock:
        if _process.client is None or _process.made_for != made_for:
            _process.client = _new_filesystem(current.endpoint, region, anonymous=current.anonymous)
            _process.made_for = made_for
        return _process.client


def _new_filesystem(endpoint: str | None, region: str | None, *, anonymous: bool) -> Any:
    if (address := endpoint or _address_in_environment()) and urlsplit(address).scheme not in {"http", "https"}:
        raise StoreError(
            "storage.endpoint (or AWS_ENDPOINT_URL) is not the address of a server",
            got=_server(),
            expected="https://HOST or http://HOST",
        )
    return package().S3FileSystem(
        anon=anonymous,
        endpoint_url=endpoint,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Servers other than Amazon's do not all know the newer checksums; all know Content-MD5.
            "request_checksum_calculation": "when_required",
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _address_in_environment() -> str | None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _server() -> str:
    """The server for messages."""
    return failures.redacted(_process.options.endpoint or _address_in_environment() or "Amazon S3")
