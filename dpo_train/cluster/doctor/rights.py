"""What whoever starts jobs may do, and the accounts that pods run under."""

from __future__ import annotations

from dpo_train.cluster.doctor.answers import Answer, failed, passed, unchecked
from dpo_train.cluster.doctor.api import find, in_namespace, post, there
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.config import RunConfig

NEEDED = tuple((verb, "ray.io", "rayjobs") for verb in ("create", "get", "watch", "patch", "delete"))
"""Of the Role dpo-launcher in k8s/base/roles.yaml: without these no job runs."""
WANTED = (("get", "", "pods"), ("list", "", "pods"), ("get", "", "pods/log"), ("list", "", "events"))
"""The rest of it: without these a job's lines, and why it waits, are not shown."""

DEFAULT_NAMESPACE = "kubeflow"
"""Of Kubeflow Pipelines with one user."""
DEFAULT_ACCOUNTS = ("pipeline-runner", "default-editor")
"""Under which Kubeflow runs tasks: with one user, and in a profile's namespace."""

_Right = tuple[str, str, str]
_API = "/apis/authorization.k8s.io/v1"


def rights(kube: Kube, _: RunConfig) -> Answer:
    """What the launcher does, asked of the API for this login."""
    missing = [right for right in (*NEEDED, *WANTED) if not _may(kube, right, None)]
    if not missing:
        return passed(f"this login may start, follow and remove jobs in {kube.namespace}")
    if set(missing).isdisjoint(NEEDED):
        what = "jobs run, but their lines or why they wait would not be shown"
    else:
        what = "jobs could not be run"
    return failed(f"this login may not {_words(missing)} in {kube.namespace}: {what}", _bind(kube.namespace, ""))


def task_rights(kube: Kube, config: RunConfig) -> Answer:
    """The same of the account under which Kubeflow's tasks run; by default it has no right on RayJobs."""
    account = f"{kubeflow_namespace(config)}:{kubeflow_account(config)}"
    user = f"system:serviceaccount:{account}"
    try:
        missing = [right for right in (*NEEDED, *WANTED) if not _may(kube, right, user)]
    except RefusedError as refused:
        if refused.status != 403:
            raise
        return unchecked(
            f"this login may not ask what {account.replace(':', '/')} may do",
            f"ask an administrator: kubectl auth can-i create rayjobs.ray.io -n {kube.namespace} --as={user}",
        )
    if not missing:
        return passed(f"{account.replace(':', '/')} may start, follow and remove jobs in {kube.namespace}")
    return failed(
        f"Kubeflow's tasks run as {account.replace(':', '/')}, which may not {_words(missing)} in {kube.namespace}",
        _bind(kube.namespace, f"--serviceaccount={account}"),
    )


def service_account(kube: Kube, config: RunConfig) -> Answer:
    """The account of Ray's pods."""
    return _account(kube, config.cluster.service_account, "cluster.service_account")


def task_account(kube: Kube, config: RunConfig) -> Answer:
    """The account of Kubeflow's tasks."""
    return _account(kube, kubeflow_account(config), "kubeflow.service_account")


def kubeflow_namespace(config: RunConfig) -> str:
    """Where Kubeflow runs the tasks of a pipeline."""
    return config.kubeflow.namespace or DEFAULT_NAMESPACE


def kubeflow_account(config: RunConfig) -> str:
    """The config's account of tasks, or the one that Kubeflow takes."""
    return config.kubeflow.service_account or DEFAULT_ACCOUNTS[config.kubeflow.namespace is not None]


def _account(kube: Kube, name: str, key: str) -> Answer:
    if find(kube, in_namespace(kube, "serviceaccounts", name)) is not None:
        return passed(f"{name} in {kube.namespace}")
    return failed(
        f"there is no service account {name} in {kube.namespace}; "
        f"there are: {there(kube, in_namespace(kube, 'serviceaccounts'))}",
        f"apply k8s/base/roles.yaml, or set {key} to one of them",
    )


def _may(kube: Kube, right: _Right, user: str | None) -> bool:
    verb, group, resource = right
    name, _, part = resource.partition("/")
    attributes = {"namespace": kube.namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
    spec: dict[str, object] = {"resourceAttributes": attributes}
    kind = "selfsubjectaccessreviews"
    if user is not None:
        kind, spec["user"] = "subjectaccessreviews", user
        spec["groups"] = [
            "system:serviceaccounts",
            f"system:serviceaccounts:{user.split(':')[2]}",
            "system:authenticated",
        ]
    return bool(post(kube, f"{_API}/{kind}", {"spec": spec})["status"]["allowed"])


def _words(missing: list[_Right]) -> str:
    """ "create, get rayjobs; list events"."""
    resources = list(dict.fromkeys(resource for _, _, resource in missing))
    return "; ".join(
        f"{', '.join(verb for verb, _, r in missing if r == resource)} {resource}" for resource in resources
    )


def _bind(namespace: str, subject: str) -> str:
    return (
        "apply k8s/base/roles.yaml and bind its Role dpo-launcher: "
        f"kubectl -n {namespace} create rolebinding dpo-launcher-more --role=dpo-launcher "
        f"{subject or '--user=NAME (kubectl auth whoami)'}"
    )
