"""The test's server is strict, and takes what Kubeflow's own client sends."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import kfp_server_api
import pytest

from pipelines.compile import PACKAGE
from tests.kubeflow import messages
from tests.kubeflow.server import Server


def test_kubeflows_own_client_works_with_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An upload, a version, a run and listings with filters, as kfp.Client asks for them."""
    import kfp

    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    client = kfp.Client(host=server.url)
    pipeline = client._pipelines_api.pipeline_service_create_pipeline({"display_name": "dpo"})
    version = client.upload_pipeline_version(str(PACKAGE), "first", pipeline_id=pipeline.pipeline_id)
    experiment = client.create_experiment("tests")
    run = client.run_pipeline(
        experiment.experiment_id,
        "mine",
        params={"config": "{}"},
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
    )

    assert client.get_pipeline_id("dpo") == pipeline.pipeline_id
    assert client.get_pipeline_id("other") is None
    assert client.get_experiment(experiment_name="tests").experiment_id == experiment.experiment_id
    assert client.get_run(run.run_id).state == "PENDING"
    assert [item.run_id for item in client.list_runs(sort_by="created_at desc").runs] == [run.run_id]
    client.terminate_run(run.run_id)
    assert client.get_run(run.run_id).state == "CANCELING"


def test_version_of_a_name_that_is_there_is_a_conflict(server: Server) -> None:
    """409, in the words of uploads."""
    api = kfp_server_api.ApiClient(kfp_server_api.Configuration(host=server.url))
    made = kfp_server_api.PipelineServiceApi(api).pipeline_service_create_pipeline({"display_name": "dpo"})
    uploads = kfp_server_api.PipelineUploadServiceApi(api)
    uploads.upload_pipeline_version(str(PACKAGE), name="one", pipelineid=made.pipeline_id)

    with pytest.raises(kfp_server_api.ApiException) as caught:
        uploads.upload_pipeline_version(str(PACKAGE), name="one", pipelineid=made.pipeline_id)

    assert caught.value.status == 409
    assert "error_message" in json.loads(caught.value.body)


def test_pipeline_that_is_none_is_refused(server: Server, tmp_path: Path) -> None:
    """A field that PipelineSpec does not have."""
    api = kfp_server_api.ApiClient(kfp_server_api.Configuration(host=server.url))
    made = kfp_server_api.PipelineServiceApi(api).pipeline_service_create_pipeline({"display_name": "dpo"})
    file = tmp_path / "dpo.yaml"
    file.write_text(PACKAGE.read_text().replace("pipelineInfo:", "pipelineInfoo:"))

    with pytest.raises(kfp_server_api.ApiException) as caught:
        kfp_server_api.PipelineUploadServiceApi(api).upload_pipeline_version(
            str(file), name="one", pipelineid=made.pipeline_id
        )

    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/apis/v2beta1/experiments", {"display_name": "a", "colour": "red"}, 400),
        ("POST", "/apis/v2beta1/experiments", {}, 400),
        ("POST", "/apis/v2beta1/experiments", {"display_name": 1}, 400),
        ("POST", "/apis/v2beta1/runs", {"display_name": "a"}, 400),
        ("GET", "/apis/v2beta1/runs?sort_by=colour", None, 400),
        ("GET", "/apis/v2beta1/runs?page_token=zzz", None, 400),
        ("GET", "/apis/v2beta1/runs/nothing", None, 404),
        ("GET", "/apis/v2beta1/nothing", None, 404),
    ],
)
def test_requests_that_are_none(method: str, path: str, body: object, status: int, server: Server) -> None:
    """Unknown and missing fields, wrong types, and what is not there."""
    data = None if body is None else json.dumps(body).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(server.url + path, data=data, method=method))

    assert caught.value.code == status


def test_answers_are_checked_too() -> None:
    """What the server of a test says has to be what Kubeflow might say."""
    messages.check("V2beta1Run", {"run_id": "a", "state": "RUNNING", "created_at": "2026-01-01T00:00:00Z"})
    for wrong in ({"state": "GONE"}, {"run_id": 5}, {"created_at": "yesterday"}, {"id": "a"}):
        with pytest.raises(ValueError):
            messages.check("V2beta1Run", wrong)
