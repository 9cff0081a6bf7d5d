"""What an output says of itself to a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact, Output, Summary, produce
from dpo_train.describe import hand_on, metadata

dsl = pytest.importorskip("kfp.dsl")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """An output of register's with a page."""

    def body(out: Output) -> Summary:
        (out.path / "report.html").write_text("<p>report</p>")
        return Summary(details={"model_name": "m", "version": "3"})

    return produce("register", {}, {}, tmp_path / "store" / "register" / "0123", body)


def test_a_page_is_handed_on_as_itself(artifact: Artifact, tmp_path: Path) -> None:
    """Kubeflow shows what lies at the artifact's own path; the next task reads the address."""
    into = dsl.HTML(uri=str(tmp_path / "kubeflow" / "report"))
    kept = into.uri

    hand_on(artifact, into, page="report.html")

    assert Path(into.path).read_text() == "<p>report</p>"
    assert into.metadata == metadata(artifact)
    assert into.metadata["address"] == artifact.address
    assert into.uri == kept


@pytest.mark.parametrize("page", ["", "frontier.html"])
def test_everything_else_says_where_it_lies(artifact: Artifact, tmp_path: Path, page: str) -> None:
    """Gigabytes stay in the store; a page that this output has not is no error."""
    into = dsl.Model(uri=str(tmp_path / "kubeflow" / "model"))

    hand_on(artifact, into, page=page)

    assert json.loads(Path(into.path).read_text())["output"] == artifact.home
