"""What `dpo doctor` concludes, how it runs its checks, and which of them a config asks for."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from dpo_train import storage
from dpo_train.cli import doctor as command
from dpo_train.cluster.doctor import Check, Finding, checks_of, installed, run, summary, to_json
from dpo_train.cluster.doctor.answers import Answer, passed
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ConfigError


@pytest.fixture(autouse=True)
def _own_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("KF_PIPELINES_ENDPOINT", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    before = storage.options()
    yield
    storage.use(before)


def config_of(folder: Path | str = "/nowhere", **sections: Any) -> RunConfig:
    model, pairs = f"{folder}/model", f"{folder}/pairs.jsonl"
    content = {"store": f"{folder}/store", "model": {"path": model}, "prepare": {"path": pairs}, **sections}
    return parse_config(json.dumps(content), origin="the test")


def names(config: RunConfig) -> list[str]:
    return [check.name for check in checks_of(config)]


def test_a_laptops_config_asks_for_nothing_but_the_laptop() -> None:
    """No line about Kubernetes, Kubeflow or s3://."""
    assert names(config_of()) == ["packages", "gpu", "disk", "data", "model", "mlflow"]


def test_a_config_that_launches_jobs_asks_for_the_cluster_in_a_fixed_order() -> None:
    """What it names comes under its name; what it does not use has no line."""
    cluster = {"launcher": "rayjob", "image": "a/b:1", "queue": "q", "priority": "p", "volumes": {"/data": "team"},
               "image_pull_secrets": ["registry"], "workers": {"gpus": 1}}  # fmt: skip

    found = names(config_of("s3://bucket", cluster=cluster))

    assert found == [
        "packages", "reach", "kubernetes", "namespace", "kuberay", "operator", "rights", "account", "image",
        "pull secret registry", "secret dpo-credentials", "claim team", "queue", "priority", "head node", "gpu nodes",
        "quota", "limits", "job", "store", "s3 inputs", "mlflow",
    ]  # fmt: skip


def test_kubeflow_and_ray_have_lines_of_their_own() -> None:
    """The rights of Kubeflow's tasks matter only where they launch jobs."""
    kubeflow = {"host": "https://kubeflow.example", "image": "a/b:1"}
    ray = {"launcher": "ray", "address": "http://head:8265"}

    assert set(names(config_of(kubeflow=kubeflow))) - set(names(config_of())) == {
        "reach", "kubeflow", "pipeline", "task image", "task account", "task secret",
    }  # fmt: skip
    assert "task rights" in names(config_of(kubeflow=kubeflow, cluster={"launcher": "rayjob", "image": "a/b:1"}))
    assert "ray" in names(config_of(cluster=ray))
    assert "gpu" not in names(config_of(cluster=ray))


def test_lines_come_in_the_order_of_the_checks() -> None:
    """The first one waits for the second's end: side by side, or never."""
    second_is_done = threading.Event()

    def first() -> Answer:
        assert second_is_done.wait(20)
        return passed("one")

    def second() -> Answer:
        second_is_done.set()
        return passed("two")

    found = list(run([Check(name="a", ask=first), Check(name="b", ask=second)]))

    assert [(each.name, each.text) for each in found] == [("a", "one"), ("b", "two")]


def test_a_check_that_hangs_holds_up_nobody() -> None:
    """Past its limit it is a failing line."""
    released = threading.Event()

    def hang() -> Answer:
        released.wait(60)
        return passed("too late")

    found = list(run([Check(name="dead", ask=hang, limit_s=0.05), Check(name="b", ask=lambda: passed("two"))]))
    released.set()

    assert [each.status for each in found] == ["fail", "pass"]
    assert "no answer within 0.05 s" in found[0].text


def test_an_error_that_nobody_expected_is_a_line() -> None:
    """Neither a traceback nor the end of the others; an address's password is not shown."""

    def broken() -> Answer:
        raise KeyError("postgresql://me:hunter2@host/db\nand more")

    def refused() -> Answer:
        raise ConfigError("It is wrong", got="x", fix="mend it")

    found = list(run([Check(name="a", ask=broken), Check(name="b", ask=refused)]))

    assert [each.status for each in found] == ["fail", "fail"]
    assert "KeyError" in found[0].text
    assert "hunter2" not in found[0].text
    assert (found[1].text, found[1].mend) == ("It is wrong. Got: x", "mend it")


def test_summary_and_json() -> None:
    """Numbers as people read them, and the same with a schema's version."""
    one = [Finding(name="a", status="pass", text="x"), Finding(name="b", status="fail", text="y", mend="z")]
    two = [*one, Finding(name="c", status="unchecked", text="w")]

    assert summary(one) == "1 passes, 1 fails"
    assert summary(two[::2]) == "1 passes, 0 fail, 1 not checkable"
    assert to_json(two) == {
        "schema_version": 1,
        "ok": False,
        "counts": {"pass": 1, "fail": 1, "unchecked": 1},
        "findings": [
            {"name": "a", "status": "pass", "text": "x", "mend": None},
            {"name": "b", "status": "fail", "text": "y", "mend": "z"},
            {"name": "c", "status": "unchecked", "text": "w", "mend": None},
        ],
    }


def test_lines_are_aligned_and_coloured_on_a_terminal_and_plain_in_a_pipe() -> None:
    """Texts begin in one column, the mend below; a line is never broken: it could not be copied."""
    findings = [
        Finding(name="a", status="pass", text="x" * 200),
        Finding(name="longer", status="fail", text="[y]", mend="kubectl [z]"),
    ]
    pipe, terminal = io.StringIO(), io.StringIO()

    command._shown(findings, ["a", "longer"], Console(file=pipe, width=60, highlight=False))
    command._shown(findings, ["a", "longer"], Console(file=terminal, force_terminal=True, width=60, highlight=False))

    assert pipe.getvalue().splitlines() == [
        f"pass  a       {'x' * 200}", "FAIL  longer  [y]", "              -> kubectl [z]", "", "1 passes, 1 fails",
    ]  # fmt: skip
    assert "\x1b[1;31mFAIL" in terminal.getvalue()


class FakeKueue:
    """Plays the part of the API that Kueue adds; the test cluster's server cannot hold its CRDs."""

    namespace = "team"

    def __init__(self, objects: dict[str, Any]) -> None:
        self._objects = objects

    def ask(self, method: str, path: str, **_: object) -> Any:
        if path not in self._objects:
            error = RefusedError("not there")
            error.status = 404
            raise error
        return self._objects[path]


def _queue(active: str) -> dict[str, Any]:
    condition = {"type": "Active", "status": active, "message": "ClusterQueue research does not exist"}
    return {
        "metadata": {"name": "q"},
        "spec": {"clusterQueue": "research"},
        "status": {"conditions": [condition]},
    }


@pytest.mark.parametrize(
    ("queue", "status", "words"),
    [
        (_queue("True"), "pass", "local queue q of cluster queue research"),
        (_queue("False"), "fail", "lets nothing in: ClusterQueue research does not exist"),
        (None, "fail", "no local queue q in team; there are: open"),
    ],
)
def test_queue(queue: dict[str, Any] | None, status: str, words: str) -> None:
    """It must be there, and let something in."""
    group = "/apis/kueue.x-k8s.io"
    path = f"{group}/v1beta2/namespaces/team/localqueues"
    objects = {
        group: {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}},
        path: {"items": [{"metadata": {"name": "open"}}]},
        **({} if queue is None else {f"{path}/q": queue}),
    }

    found = installed.queue(cast(Kube, FakeKueue(objects)), config_of(cluster={"launcher": "rayjob", "queue": "q"}))

    assert (found.status, words in found.text) == (status, True), found


def test_a_priority_that_kueue_does_not_know() -> None:
    """A job's label names a class of Kueue's own, beside that of the pods."""
    objects = {
        "/apis/scheduling.k8s.io/v1/priorityclasses/p": {"value": 5},
        "/apis/kueue.x-k8s.io": {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}},
        "/apis/kueue.x-k8s.io/v1beta2/workloadpriorityclasses": {"items": []},
    }
    config = config_of(cluster={"launcher": "rayjob", "queue": "q", "priority": "p"})

    found = installed.priority(cast(Kube, FakeKueue(objects)), config)

    assert found.status == "fail"
    assert "WorkloadPriorityClass of that name is not" in found.text
