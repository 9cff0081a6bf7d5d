"""What the Kubernetes API's answers mean, in words for people. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from dpo_train.errors import UserError

PASSING = {408, 429, 500, 502, 503, 504}
"""Answers that may be others at the next attempt."""

ANOTHER = {404, 409, 422}
"""Answers to a change of an object that is gone, or whose name another one has: 422 says that a uid cannot change."""

_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"'
    r'(?: in API group "(?P<group>[^"]*)")?(?:.*in the namespace "(?P<namespace>[^"]*)")?'
)
_NO_API = ("404 page not found", "the server could not find the requested resource")
_ACCOUNT = "system:serviceaccount:"


class ClusterError(UserError):
    """The cluster refuses the caller, or what is asked of it."""


class RefusedError(ClusterError):
    """An answer of the API that another attempt would not change."""

    status = 0
    """HTTP's; 0: unknown, after the error has travelled between processes."""
    words = ""
    """The API's own."""


class NoLoginError(ClusterError):
    """There is no usable login for a cluster, or its certificate is not trusted."""


def words_of(content: bytes) -> str:
    """The API's message: of a Status object, or the text itself."""
    text = content.decode("utf-8", errors="replace").strip()
    try:
        status = json.loads(text)
    except ValueError:
        return text[:500]
    return str(status.get("message") or text) if isinstance(status, dict) else text


def refusal(status: int, words: str, *, action: str, namespace: str, role: str) -> RefusedError:
    """The error for an answer.

    Args:
        action: what was asked, such as "POST /apis/ray.io/v1/namespaces/dpo/rayjobs".
        role: the Role of ``k8s/base/roles.yaml`` that holds what is needed here.
    """
    what, fix = _explained(status, words, action, namespace, role)
    error = RefusedError(what, got=words or f"HTTP {status}", fix=fix)
    error.status, error.words = status, words
    return error


def _explained(status: int, words: str, action: str, namespace: str, role: str) -> tuple[str, str]:
    """What happened, and what to do."""
    if status == 401:
        return (
            "The cluster does not accept this login",
            "the token has expired or belongs to another cluster: log in again, or renew the kubeconfig",
        )
    if status == 403 and "exceeded quota" in words and "rayjobs" in words:
        return (
            f"The quota of the namespace {namespace} allows no more RayJobs",
            f"ended ones count until they are removed, a day after their end: `dpo reap --namespace {namespace} "
            "--keep-hours 1` makes room now. Else wait, or have the quota raised",
        )
    if status == 403 and "exceeded quota" in words:
        return (
            f"The quota of the namespace {namespace} does not allow it",
            "wait until other jobs have ended, ask for less (cluster.head, cluster.workers), or have the quota raised",
        )
    if status == 403:
        return _forbidden(words, action, namespace, role)
    if status == 404 and words in _NO_API and "/ray.io/" in action:
        return "KubeRay is not installed in this cluster", "install the KubeRay operator with its CRDs (ray.io/v1)"
    if status == 404 and words.startswith("namespaces "):
        return f"The namespace {namespace} does not exist", "set cluster.namespace, or have it created"
    if status in {400, 422}:
        return (
            f"The cluster does not accept what was asked ({action})",
            "the message names the field; if it is one that KubeRay knows, the CRDs of this cluster are older: renew "
            "them together with the operator",
        )
    return f"The cluster refused {action}", "look at the message"


def _forbidden(words: str, action: str, namespace: str, role: str) -> tuple[str, str]:
    found = _FORBIDDEN.search(words)
    if found is None:
        return f"The cluster forbids {action}", f"ask who administers the namespace {namespace}"
    user, where = found["user"], found["namespace"] or namespace
    subject, who = f"--user={user}", f"user {user}"
    if user.startswith(_ACCOUNT):
        subject = f"--serviceaccount={user.removeprefix(_ACCOUNT)}"
        who = f"service account {user.removeprefix(_ACCOUNT).replace(':', '/')}"
    return (
        f"The {who} may not {found['verb']} {found['resource']} in the namespace {where}",
        f"apply k8s/base/roles.yaml and bind its Role {role}: kubectl -n {where} create rolebinding {role}-more "
        f"--role={role} {subject}",
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait; None: it asks nothing."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
