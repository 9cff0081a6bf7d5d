"""Ray's Jobs REST interface by plain HTTP, and what its answers mean. No ray is needed on this side.

    GET    /api/version            is this a Ray, and may we speak to it?
    POST   /api/jobs/              submit, under a name of ours
    GET    /api/jobs/<name>        its state
    GET    /api/jobs/<name>/logs   all that it has printed so far
    POST   /api/jobs/<name>/stop

Names make every request repeatable, so what may pass (no connection, a cut answer, status 408, 429, 5xx) is asked again
with growing pauses, ``FIRST_S`` seconds before the cluster has answered once and ``AWAY_S`` afterwards.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2

from dpo_train.errors import ConfigError, RunError, UserError

FIRST_S = 20.0
"""A wrong address is said soon."""
AWAY_S = 600.0
"""A head that is restarted is back within minutes; its jobs go on meanwhile."""
REQUEST_S = 60.0
"""For a whole answer; Ray itself looks for an agent for 10 seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
MOST_BYTES = 512 << 20
"""Of an answer: the log of a job that prints an event a step has some 100 bytes a line."""
_MESSAGE_CHARS = 300

TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_TOKEN_PATH = Path("~/.ray/auth_token")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_PASSING = {408, 425, 429}

LIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True, kw_only=True)
class State:
    """What Ray says of a job."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    metadata: Mapping[str, str]
    error_type: str | None
    exit_code: int | None
    """Of the job's process, if it came to its end."""
    started_s: float
    """Seconds since 1970, by the cluster's clock."""

    @property
    def is_live(self) -> bool:
        return self.status in LIVE


@dataclass(frozen=True)
class _Passing:
    """What went wrong, and may go well another time."""

    what: str
    wish_s: float = 0.0


class RayRest:
    """One Ray cluster's interface, to be closed."""

    def __init__(
        self,
        address: str,
        *,
        tell: Callable[[str], None],
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = checked_address(address)
        self._token = token_for(self._url)
        self._tell, self._wait, self._clock = tell, wait, clock
        self._known = False
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=REQUEST_S,
            follow_redirects=False,  # the token is for this server
        )

    def close(self) -> None:
        self._http.close()

    def check(self) -> None:
        """Makes sure that this is a Ray that listens to us.

        Raises:
            UserError: it is not, does not answer, or refuses us.
        """
        status, body = self._ask("GET", "/api/version")
        try:
            known = status == HTTPStatus.OK and isinstance(json.loads(body)["ray_version"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(
                f"What answers at {self._url} is not Ray's dashboard",
                got=f"status {status}: {self._clean(body)}",
                fix="set cluster.address to the address of its dashboard, e.g. http://head:8265; the port 6379 or "
                "10001 is another one",
            )
        self._known = True

    def find(self, name: str) -> State | None:
        """The job's state; None: the cluster knows no such job."""
        status, body = self._ask("GET", f"/api/jobs/{name}")
        if status == HTTPStatus.NOT_FOUND:
            return None
        content = self._content(status, body)
        return State(
            status=str(content["status"]),
            message=str(content.get("message") or ""),
            metadata=content.get("metadata") or {},
            error_type=content.get("error_type"),
            exit_code=content.get("driver_exit_code"),
            started_s=float(content.get("start_time") or 0) / 1000,
        )

    def submit(self, spec: Mapping[str, Any]) -> bool:
        """Submits a job; False: there is one of this name already, maybe by a request of ours whose answer was lost."""
        status, body = self._ask("POST", "/api/jobs/", spec)
        if status == HTTPStatus.CONFLICT:
            return False
        self._content(status, body)
        return True

    def logs(self, name: str, *, within_s: float) -> str:
        """All that the job has printed so far; asked again within so many seconds.

        Raises:
            RunError: they cannot be read, for example because the machine of its process is gone.
        """
        status, body = self._ask("GET", f"/api/jobs/{name}/logs", away_s=within_s)
        return str(self._content(status, body)["logs"])

    def stop(self, name: str, *, within_s: float) -> None:
        """Asks for the job's end; one that has ended, or is not known, is left alone."""
        self._ask("POST", f"/api/jobs/{name}/stop", away_s=within_s)

    def _ask(
        self, method: str, path: str, payload: Mapping[str, Any] | None = None, *, away_s: float | None = None
    ) -> tuple[int, str]:
        """Status and body of an answer that is one: no refusal of the caller, and nothing that may pass."""
        limit_s = (AWAY_S if self._known else FIRST_S) if away_s is None else away_s
        start, attempt = self._clock(), 0
        while True:
            found = self._once(method, path, payload)
            if not isinstance(found, _Passing):
                return found
            attempt += 1
            pause_s = max(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)), found.wish_s)
            if self._clock() - start + pause_s > limit_s:
                raise self._gave_up(found.what, limit_s)
            if attempt == 3:
                self._tell(f"Ray at {self._url}: {found.what}; trying again")
            self._wait(pause_s)

    def _once(self, method: str, path: str, payload: Mapping[str, Any] | None) -> tuple[int, str] | _Passing:
        try:
            with self._http.stream(method, self._url + path, json=payload) as response:
                body, end = bytearray(), self._clock() + REQUEST_S
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > MOST_BYTES:
                        return _Passing(f"an answer of more than {MOST_BYTES >> 20} MiB")
                    if self._clock() > end:
                        return _Passing(f"no whole answer within {REQUEST_S:g} s")
        except (httpx2.RequestError, httpx2.StreamError) as error:
            return _Passing(self._clean(f"{type(error).__name__}: {error}"))
        return self._meaning(response, body.decode("utf-8", "replace"))

    def _meaning(self, response: httpx2.Response, text: str) -> tuple[int, str] | _Passing:
        """Tells answers from refusals, which are raised, and from what may pass."""
        status = response.status_code
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise self._refused(status)
        if 300 <= status < 400:
            raise UserError(
                f"The server at {self._url} points elsewhere, maybe to a login page",
                got=f"status {status} to {self._clean(response.headers.get('location', 'nowhere'))}",
                fix="set cluster.address to Ray's dashboard itself",
            )
        if status >= 400 and "already exists" in text:
            return HTTPStatus.CONFLICT, text  # Ray says 500
        # So is what an agent refused to the dashboard before it.
        if status == HTTPStatus.BAD_REQUEST or "status code 400" in text:
            raise UserError(
                f"Ray at {self._url} refuses the request",
                got=self._clean(text.strip().rpartition("\n")[2]),
                fix="see that the cluster has a Ray of 2.60 or newer",
            )
        if status == HTTPStatus.NOT_FOUND and self._known and "does not exist" not in text:
            return _Passing(f"status {status}: {self._clean(text)}")  # a gateway without a server behind it
        if status in _PASSING or status >= 500:
            return _Passing(f"status {status}: {self._clean(text)}", _seconds(response.headers.get("retry-after", "")))
        return status, text

    def _content(self, status: int, body: str) -> dict[str, Any]:
        try:
            content = json.loads(body)
            if status == HTTPStatus.OK and isinstance(content, dict):
                return content
        except ValueError:
            pass
        raise RunError(f"Ray at {self._url} gave an answer that it should not", got=f"{status}: {self._clean(body)}")

    def _refused(self, status: int) -> UserError:
        if status == HTTPStatus.UNAUTHORIZED and not self._token:
            what, fix = "asks for a token", f"set {TOKEN} to the cluster's token (`ray get-auth-token` there shows it)"
        else:
            what, fix = "refuses the token", f"set {TOKEN} to the token of this very cluster"
        return UserError(f"Ray at {self._url} {what}", got=f"status {int(status)}", fix=fix)

    def _gave_up(self, what: str, limit_s: float) -> UserError | RunError:
        if self._known:
            return RunError(
                f"Ray at {self._url} gave no answer" + (f" for {limit_s:.0f} s" if limit_s else ""),
                got=what,
                fix="see that the cluster is well; its jobs may go on, and the same command finds them again",
            )
        return UserError(
            f"Ray at {self._url} does not answer",
            got=what,
            fix="check cluster.address (http://host:8265), that the head listens there (ray start --dashboard-host), "
            "and that this machine may reach it",
        )

    def _clean(self, text: str) -> str:
        """A foreign text as one short line, without the token."""
        line = " ".join((text.replace(self._token, "***") if self._token else text).split())
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)[:_MESSAGE_CHARS].rstrip(".")


def checked_address(address: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is none of HTTP, or holds a login.
    """
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.userinfo:
        raise ConfigError("cluster.address holds a login", fix=f"take it out, and put the cluster's token in {TOKEN}")
    if url.scheme not in {"http", "https"} or not url.host or url.query:
        raise ConfigError(
            "cluster.address is not the address of Ray's dashboard", got=address, expected="http://head:8265"
        )
    return address.rstrip("/")


def token_for(url: str) -> str:
    """The token that Ray's own tools would use; without one, an empty text.

    The token in the home directory belongs to the Ray of this machine, and is not sent to others.
    """
    if token := os.environ.get(TOKEN, "").strip():
        return token
    named = os.environ.get(TOKEN_PATH)
    if named is None and httpx2.URL(url).host not in _LOOPBACK:
        return ""
    path = Path(named) if named is not None else DEFAULT_TOKEN_PATH.expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named is None:
            return ""
        raise UserError(f"The file that {TOKEN_PATH} names cannot be read", got=error.strerror) from None


def _seconds(text: str) -> float:
    """Seconds of a Retry-After header; 0 where it is none, or a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
