"""What `dpo doctor` makes of quantities, quotas, tolerations, keys of Secrets, and of this machine."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster.doctor import checks_of, local, run
from dpo_train.cluster.doctor.demand import applies, pods_of, tolerates, total
from dpo_train.cluster.doctor.installed import job_manifest
from dpo_train.cluster.doctor.logins import image, judged
from dpo_train.cluster.doctor.quantities import number, shown
from tests.unit.cluster.test_doctor import _own_options, config_of

__all__ = ["_own_options"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1500m", "1.5"),
        ("16Gi", 16 * 2**30),
        ("2", 2),
        ("1e3", 1000),
        ("0.5", "0.5"),
        ("3M", 3_000_000),
        ("2E", 2 * 10**18),
    ],
)
def test_quantities(text: str, value: str | int) -> None:
    """Kubernetes' ways to write a number."""
    assert number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "Gi", "1Q", "1 Gi x", "ni"])
def test_what_is_no_quantity(text: str) -> None:
    """Said as an error, and not read as something."""
    with pytest.raises(ValueError, match="no quantity"):
        number(text)


def test_quantities_for_people() -> None:
    """Memory in GiB, GPUs and cores as they are."""
    assert shown("requests.memory", Decimal(3 * 2**29)) == "1.5Gi"
    assert shown("nvidia.com/gpu", Decimal(16)) == "16"
    assert shown("cpu", Decimal("1000")) == "1000"


def test_what_a_job_counts_as() -> None:
    """Head 4 cores, two to four workers of 8 cores and 2 GPUs, submitter half a core; the autoscaler's half as well."""
    workers = {"gpus": 2, "cpus": 8, "memory": "32Gi"}
    config = config_of(compute={"workers": 8, "min_workers": 4}, cluster={"launcher": "rayjob", "workers": workers})

    pods = pods_of(job_manifest(config, "team"))
    least, most = total(pods, most=False), total(pods, most=True)

    assert least["requests.cpu"] == Decimal("4") + 2 * 8 + Decimal("0.5") + Decimal("0.5")
    assert most["cpu"] == Decimal("4") + 4 * 8 + 1
    assert most["requests.nvidia.com/gpu"] == 8
    assert (least["pods"], most["count/pods"]) == (4, 6)
    assert least["count/rayjobs.ray.io"] == 1


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ({}, True),
        ({"scopes": ["NotTerminating"]}, True),
        ({"scopes": ["Terminating"]}, False),
        ({"scopes": ["BestEffort"]}, False),
        (
            {
                "scopeSelector": {
                    "matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["p"]}]
                }
            },
            True,
        ),
        (
            {
                "scopeSelector": {
                    "matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["q"]}]
                }
            },
            False,
        ),
        ({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "DoesNotExist"}]}}, False),
    ],
)
def test_which_quotas_count_a_jobs_pods(spec: dict[str, Any], counts: bool) -> None:
    """By their scopes."""
    pods = pods_of(job_manifest(config_of(cluster={"launcher": "rayjob", "priority": "p"}), "team"))

    assert applies({"spec": spec}, pods) is counts


@pytest.mark.parametrize(
    ("toleration", "is_tolerated"),
    [
        ({"key": "team", "operator": "Equal", "value": "a", "effect": "NoSchedule"}, True),
        ({"key": "team", "value": "a"}, True),
        ({"key": "team", "value": "b"}, False),
        ({"key": "team", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "team", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: dict[str, str], is_tolerated: bool) -> None:
    """Kubernetes' rules, for the taint team=a:NoSchedule."""
    assert tolerates([toleration], {"key": "team", "value": "a", "effect": "NoSchedule"}) is is_tolerated


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["AWS_ACCESS_KEY_ID", "AWS_SECRET_KEY"], "AWS_SECRET_KEY, which nobody reads; expected AWS_SECRET_ACCESS_KEY"),
        (["accesskey", "secretkey"], "accesskey, which nobody reads; expected AWS_ACCESS_KEY_ID"),
        (["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCES_KEY"], "AWS_SECRET_ACCES_KEY, which nobody reads; expected"),
        (["mlflow_tracking_username", "MLFLOW_TRACKING_PASSWORD"], "expected MLFLOW_TRACKING_USERNAME"),
        (["MLFLOW_TRACKING_PASSWORD"], "MLFLOW_TRACKING_PASSWORD without MLFLOW_TRACKING_USERNAME"),
        (["aws-key"], "the key aws-key, which can be no variable's name"),
        (["HF_TOKEN"], "no JUDGE_KEY, which the judge needs"),
        ([], "no key at all"),
    ],
)
def test_keys_of_a_secret_that_are_of_no_use(keys: list[str], words: str) -> None:
    """Each with what is expected."""
    found = judged("logins", keys, (), ["JUDGE_KEY"], "team")

    assert found.status == "fail"
    assert words in found.text
    assert "kubectl -n team edit secret logins" in str(found.mend)


@pytest.mark.parametrize(
    ("keys", "elsewhere"),
    [
        (["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MY_OWN_VARIABLE"], []),
        (["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY"], []),
        (["MLFLOW_TRACKING_PASSWORD"], ["MLFLOW_TRACKING_USERNAME"]),
        (["HF_TOKEN"], []),
    ],
)
def test_keys_of_a_secret_that_will_do(keys: list[str], elsewhere: list[str]) -> None:
    """Variables of the user's own are nobody's business."""
    assert judged("logins", keys, elsewhere, (), "team").status == "pass"


@pytest.mark.parametrize(
    ("named", "status"),
    [
        ("registry:5000/dpo@sha256:" + "0" * 64, "pass"),
        ("registry:5000/dpo:1.0", "pass"),
        ("registry:5000/dpo", "fail"),
    ],
)
def test_image(named: str, status: str) -> None:
    """A version must be named; a registry's port is none."""
    assert image(config_of(cluster={"launcher": "rayjob", "image": named}), "cluster.image").status == status
    assert image(config_of(cluster={"launcher": "rayjob"}), "cluster.image").status == "fail"


def test_packages_that_are_there() -> None:
    """Versions are shown; an address at s3:// asks for s3fs."""
    found = local.packages(config_of("s3://bucket"))

    assert found.status == "pass"
    assert all(name in found.text for name in ("Python 3.", "torch 2.", "mlflow 3.", "s3fs 20"))


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its reason, and one command that brings them all."""
    needs = [
        "torch>=2.11",
        "no-such-ray>=2.60; extra == 'ray'",
        "pyyaml>=900; extra == 'mlflow'",
        "nothing; extra == 'kfp'",
    ]
    monkeypatch.setattr(local.importlib.metadata, "requires", lambda _: needs)

    found = local.packages(config_of())

    assert found.status == "fail"
    assert "no-such-ray is missing (compute.executor=ray)" in found.text
    assert "needed >=900 (every run is tracked)" in found.text
    assert found.mend == "pip install --upgrade 'dpo-train[mlflow,ray]'"


def test_disk(tmp_path: Path) -> None:
    """The store need not be there, and is not made; too little room for a training's checkpoints is said."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"dtype": "bfloat16"}')
    with (tmp_path / "model" / "model.safetensors").open("wb") as stream:
        stream.truncate(4 << 40)  # sparse: it takes no room itself

    small = local.disk(config_of(tmp_path))
    with_adapters = local.disk(config_of(tmp_path, train={"lora": {}}))

    assert small.status == "fail"
    assert "a training may take 57,174.6 GB" in small.text
    assert with_adapters.status == "pass"
    assert not (tmp_path / "store").exists()


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    """In words of the system."""
    (tmp_path / "store").write_text("")

    found = local.disk(config_of(tmp_path))

    assert found.status == "fail"
    assert "cannot be written" in found.text


def test_data_and_model(tmp_path: Path) -> None:
    """By name and size alone."""
    config = config_of(tmp_path)
    missing = {each.name: each for each in run([c for c in checks_of(config) if c.name in {"data", "model"}])}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0" * 10)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    assert [each.status for each in missing.values()] == ["fail", "fail"]
    assert "There is no data at" in missing["data"].text
    assert local.data(config).text == "1 source found"
    assert local.model(config).status == "pass"
    assert local.model(config_of(model={"path": "org/model"})).status == "unchecked"


@pytest.mark.parametrize(
    ("device", "gpus", "driver", "status", "words"),
    [
        ("auto", 0, None, "pass", "trains on"),
        ("cuda", 0, None, "fail", "there is no GPU driver here"),
        ("auto", 0, "550.1", "fail", "driver 550.1), and torch 2.13.0 cannot use it: this torch is built for CPUs"),
        ("auto", 2, "550.1", "pass", "2 x H100, driver 550.1"),
        ("auto", 1, "550.1", "fail", "compute.workers=2, and there are 1 GPUs"),
    ],
)
def test_gpus(device: str, gpus: int, driver: str | None, status: str, words: str) -> None:
    """What torch says of them against what the config asks for; the answers are made up, no machine here has one."""
    config = config_of(compute={"device": device, "workers": 2})
    said = {"torch": "2.13.0", "built": "12.8" if gpus else None, "gpus": ["H100"] * gpus}

    found = local._judged(config, said, driver)

    assert (found.status, words in found.text) == (status, True), found
