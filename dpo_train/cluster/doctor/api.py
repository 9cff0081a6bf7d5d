"""The cluster as checks see it: a login that is found once, and what refusals mean to a check."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dpo_train.cluster.doctor.answers import Answer, answer_of, unchecked
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.config import RunConfig
from dpo_train.errors import DpoError, first_line

PATIENCE_S = 8.0
"""A job waits two minutes for an API that is away; whoever asks how things stand does not."""
TIMEOUT_S = 10.0
PAGE = "500"

Look = Callable[[Kube, RunConfig], Answer]


class Access:
    """One cluster, asked once whether it is there. Several threads may want it."""

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace
        self._lock = threading.Lock()
        self._kube: Kube | None = None
        self._error: Exception | None = None
        self.version = ""
        """The server's, such as "v1.33.1", once it is known."""

    def kube(self) -> Kube:
        """The cluster, in the config's namespace.

        Raises:
            DpoError: there is no login, or it does not answer; the same to everyone.
        """
        with self._lock:
            if self._kube is None and self._error is None:
                try:
                    kube = Kube(self._namespace)
                    self.version = str(get(kube, "/version").get("gitVersion", "unknown"))
                    self._kube = kube
                except Exception as error:
                    self._error = error
        if self._kube is None:
            assert self._error is not None
            raise self._error
        return self._kube

    def check(self, look: Look, config: RunConfig, *, of: str | None = None) -> Callable[[], Answer]:
        """A check that asks the cluster.

        Args:
            of: another namespace than the jobs'.
        """

        def ask() -> Answer:
            try:
                kube = self.kube()
            except Exception as error:
                why = ", see the line `kubernetes`" if config.cluster.launcher == "rayjob" else f": {first_line(error)}"
                return unchecked(f"the cluster cannot be asked{why}")
            if of is not None and of != kube.namespace:
                kube = Kube(of)
            try:
                return look(kube, config)
            except RefusedError as refused:
                if refused.status == 403:
                    return unchecked(_forbidden(refused), "ask who administers the cluster, or grant the right")
                raise
            except DpoError as error:
                return answer_of(error)

        return ask


def get(kube: Kube, path: str, query: dict[str, str] | None = None) -> dict[str, Any]:
    """An object, or one page of a list."""
    return kube.ask("GET", path, query=query, patience_s=PATIENCE_S, timeout_s=TIMEOUT_S)


def find(kube: Kube, path: str) -> dict[str, Any] | None:
    """An object, or None where there is none."""
    try:
        return get(kube, path)
    except RefusedError as refused:
        if refused.status == 404:
            return None
        raise


def post(kube: Kube, path: str, body: object, query: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer to a question that is asked by POST."""
    return kube.ask("POST", path, query=query, body=body, patience_s=PATIENCE_S, timeout_s=TIMEOUT_S)


def listed(kube: Kube, path: str, query: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """All of a list, page after page."""
    found: list[dict[str, Any]] = []
    page = {"limit": PAGE, **(query or {})}
    while True:
        answer = get(kube, path, page)
        found += answer.get("items") or []
        token = answer.get("metadata", {}).get("continue")
        if not token:
            return found
        page = {**page, "continue": str(token)}


def there(kube: Kube, path: str) -> str:
    """The names of what a list has, for people; the right to read one thing is not that to see them all."""
    try:
        return names(listed(kube, path))
    except RefusedError as refused:
        if refused.status != 403:
            raise
        return "(this login may not see which)"


def names(items: list[dict[str, Any]]) -> str:
    """The names of objects, for people."""
    found = sorted(str(item["metadata"]["name"]) for item in items)
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "") if found else "none"


def in_namespace(kube: Kube, kind: str, name: str = "") -> str:
    """The path of what the core API has in the namespace."""
    return f"/api/v1/namespaces/{kube.namespace}/{kind}" + (f"/{name}" if name else "")


def _forbidden(refused: RefusedError) -> str:
    return f"this login may not look: {refused.words.strip() or 'forbidden'}"
