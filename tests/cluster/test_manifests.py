"""RayJobs of twenty configs, before a real API server that refuses what it does not know."""

from __future__ import annotations

import pytest

from dpo_train.cluster.job import job_for
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.cluster.rayjob import manifest, spec_hash
from tests.cluster.configs import CONFIGS, config_of

STRICT = {"fieldValidation": "Strict", "dryRun": "All"}


def _path(kube: Kube) -> str:
    return f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs"


@pytest.mark.parametrize("name", CONFIGS)
def test_rayjob_is_valid(admin: Kube, name: str) -> None:
    """Schema and rules of KubeRay's CRD accept it with every field known, and keep the hash that tells it apart."""
    config = config_of(name)
    job = manifest(
        job_for("train", config, {"score_reference": "score_reference/0"}), config, namespace=admin.namespace
    )

    found = admin.ask("POST", _path(admin), body=job, query=STRICT)

    assert spec_hash(found) == spec_hash(job)
    assert found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"] == "workers"


def test_server_refuses_an_unknown_field(admin: Kube) -> None:
    """The check can fail: the same job with a field misspelt is not accepted."""
    config = config_of("plain")
    job = manifest(job_for("train", config, {}), config, namespace=admin.namespace)
    job["spec"]["backofLimit"] = 0

    with pytest.raises(RefusedError, match="backofLimit"):
        admin.ask("POST", _path(admin), body=job, query=STRICT)
