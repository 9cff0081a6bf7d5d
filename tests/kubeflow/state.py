"""What the server holds, and the rules that all its listings share."""

from __future__ import annotations

import base64
import datetime
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

NEVER = "1970-01-01T00:00:00Z"
"""What Kubeflow writes for what has not happened."""
MOST_PER_PAGE = 200


class RefusalError(Exception):
    """An answer that is none: HTTP's status and Kubeflow's words."""

    def __init__(self, status: int, message: str, *, code: int = 13, upload: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.body = (
            {"error_message": message, "error_details": message}
            if upload
            else {"error": message, "code": code, "message": message, "details": []}
        )


@dataclass
class State:
    """Everything that the server knows. A test may look into it, and change it."""

    multi_user: bool = False
    namespaces: set[str] = field(default_factory=set)
    """Those that the one user may use."""
    token: str | None = None
    cookie: str | None = None
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    recurring_runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    """By the name of the pod."""
    logs_by_api: bool = True
    """False: as in release 2.17 with several users, whose log endpoint never knows who asks."""
    release: str = "2.17.0"
    pod_names: str = "v2"
    """As Argo's POD_NAMES."""
    clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(tz=datetime.UTC)

    def now(self) -> str:
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    def check_namespace(self, namespace: str | None) -> None:
        """Whether the user may do something there."""
        if not self.multi_user:
            return
        if not namespace:
            raise RefusalError(400, "Invalid input error: Namespace cannot be empty in multi-user mode", code=3)
        if namespace not in self.namespaces:
            raise RefusalError(403, f"User 'someone' is not authorized in namespace {namespace}", code=7)


def new_id() -> str:
    return str(uuid.uuid4())


def find(table: Mapping[str, dict[str, Any]], key: str, what: str) -> dict[str, Any]:
    """The entry, or 404 in Kubeflow's words."""
    if key not in table:
        raise RefusalError(404, f"ResourceNotFoundError: {what} {key} not found.", code=5)
    return table[key]


def page(
    items: Iterable[dict[str, Any]],
    query: Mapping[str, str],
    *,
    key: str,
    fields: Iterable[str],
    default_sort: str = "created_at",
) -> dict[str, Any]:
    """One page of a listing, filtered and sorted as the query says."""
    allowed = set(fields)
    kept = [item for item in items if _passes(item, query.get("filter", ""), allowed)]
    name, _, direction = query.get("sort_by", default_sort).partition(" ")
    if name not in allowed or direction not in {"", "asc", "desc"}:
        raise RefusalError(400, f"Invalid input error: Cannot sort on field {name!r} {direction!r}", code=3)
    kept.sort(key=lambda item: str(item.get(name, "")), reverse=direction == "desc")
    size = min(int(query.get("page_size") or 20), MOST_PER_PAGE)
    criteria = [query.get("filter", ""), query.get("sort_by", "")]
    start = 0
    if token := query.get("page_token"):
        try:
            start, *then = json.loads(base64.b64decode(token))
        except ValueError:
            raise RefusalError(400, "Invalid input error: Invalid page token", code=3) from None
        if then != criteria:
            raise RefusalError(
                400, "Invalid input error: page token does not match the supplied sort by or filter", code=3
            )
    end = start + size
    answer: dict[str, Any] = {key: kept[start:end], "total_size": len(kept)}
    if end < len(kept):
        answer["next_page_token"] = base64.b64encode(json.dumps([end, *criteria]).encode()).decode()
    return answer


def _passes(item: Mapping[str, Any], text: str, allowed: set[str]) -> bool:
    if not text:
        return True
    # The server takes off a quotation that HTTP has taken off already.
    predicates = json.loads(unquote(text.replace("+", " ")))["predicates"]
    for predicate in predicates:
        if predicate["key"] not in allowed:
            raise RefusalError(400, f"Invalid input error: no filter on {predicate['key']}", code=3)
        value, wanted = item.get(predicate["key"]), predicate.get("string_value", predicate.get("stringValue"))
        if predicate["operation"] in {"EQUALS", 1}:
            if value != wanted:
                return False
        elif predicate["operation"] in {"IS_SUBSTRING", 9}:
            if wanted not in str(value):
                return False
        else:
            raise RefusalError(400, f"Invalid input error: operation {predicate['operation']}", code=3)
    return True
