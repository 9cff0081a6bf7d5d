"""One object of the Kubernetes API, as it is now and after each change."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from dpo_train.cluster.kube import Kube, StreamBrokenError
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.errors import RunError

PATIENCE_S = 900.0
"""So long the API may be away while a job runs, which does not need it: upgrades of a control plane take minutes."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
SLACK_S = 15.0


class _GoneError(Exception):
    """The server does not remember the version to go on from."""


def watch(kube: Kube, collection: str, name: str, *, every_s: float) -> Iterator[dict[str, Any] | None]:
    """The object; again after each change, and at least every ``every_s`` seconds. None, and the end: it was deleted.

    A watch that ends or breaks goes on from the last version seen; where that is too old, the object is read anew, so
    that no last state is missed.

    Raises:
        RefusedError: the caller may not, or may not any more.
        RunError: the API was away for ``PATIENCE_S``.
    """
    latest: dict[str, Any] | None = None
    version = ""
    failures, away_since = 0, 0.0
    while True:
        try:
            if latest is None:
                latest = kube.ask("GET", f"{collection}/{name}", patience_s=PATIENCE_S)
                version = latest["metadata"]["resourceVersion"]
            yield latest
            for kind, seen in _events(kube, collection, name, version, every_s):
                version = seen["metadata"]["resourceVersion"]
                failures = 0
                if kind == "DELETED":
                    yield None
                    return
                if kind != "BOOKMARK":
                    latest = seen
                    yield latest
            failures = 0
        except RefusedError as refused:
            if refused.status == 404 and refused.words.startswith(collection.rsplit("/", 1)[1]):
                yield None
                return
            if refused.status != 410:
                raise
            latest = None
            kube.pause(FIRST_PAUSE_S)
        except _GoneError:
            latest = None
            kube.pause(FIRST_PAUSE_S)
        except StreamBrokenError as broken:
            away_since = away_since if failures else time.monotonic()
            failures += 1
            if time.monotonic() - away_since > PATIENCE_S:
                raise RunError("The watch of the job breaks again and again", got=str(broken)) from broken
            kube.pause(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (failures - 1)))


def _events(
    kube: Kube, collection: str, name: str, version: str, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The changes since ``version``, for so many seconds.

    Raises:
        _GoneError: the version is too old.
        StreamBrokenError: the watch was cut.
    """
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={name}",
        "resourceVersion": version,
        "timeoutSeconds": str(max(1, round(seconds))),
        "allowWatchBookmarks": "true",
    }
    for text in kube.lines(collection, query, silence_s=seconds + SLACK_S, patience_s=PATIENCE_S):
        try:
            event = json.loads(text)
        except ValueError as error:
            raise StreamBrokenError(f"an event was cut: {text[:80]}") from error
        if event["type"] == "ERROR":
            status = event["object"]
            if status.get("code") == 410:
                raise _GoneError
            raise StreamBrokenError(str(status.get("message")))
        yield event["type"], event["object"]
