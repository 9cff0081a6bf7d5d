"""``dpo run`` goes through the pipeline's first and last task too: nothing to do is green, a failure is told."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("kfp")
pytest.importorskip("mlflow")

from dpo_train.preflight import data_digest
from dpo_train.tracking import Tracking
from tests.command import dpo
from tests.projects import Project, project
from tests.webhook import webhook

__all__ = ["project"]


def test_run_with_nothing_new_exits_0_and_says_so_in_a_line(project: Project) -> None:
    """The champion was made of the same data: no stage runs, and MLflow has a finished run that says why."""
    tracking, name = Tracking(project.config), project.config.register.model_name
    tracking.client.set_model_version_tag(name, "1", "dpo.data", data_digest(project.config))

    finished = dpo(
        "run", str(project.file), "--name", "nightly", "retrain.when=new_data", store=Path(project.config.store)
    )

    tracking.client.delete_model_version_tag(name, "1", "dpo.data")
    assert finished.code == 0, finished.output + finished.log[-5000:]
    assert finished.ends() == {}
    assert "unchanged: the champion, dpo-policy version 1, was made of the same data" in finished.output
    run_id = tracking.find_child(None, "dpo.outcome", "unchanged")
    assert tracking.client.get_run(run_id).info.status == "FINISHED"


def test_failed_run_exits_as_before_and_the_webhook_hears_the_stage_s_own_words(project: Project) -> None:
    """The user's mistake is exit code 2; the terminal, the log and the events do not hold the webhook's address."""
    with webhook() as hook:
        finished = dpo(
            "run", str(project.file), "evaluate.min_heldout_pairs=5000",
            store=Path(project.config.store), DPO_WEBHOOK_URL=hook.url,
        )  # fmt: skip
        (told,) = hook.received

    assert finished.code == 2, finished.output + finished.log[-5000:]
    assert "Failed in evaluate. Too few held-out pairs" in finished.output
    assert told["outcome"] == "failed"
    assert told["message"].startswith("DataError: Too few held-out pairs")
    assert told["mlflow_run"]
    assert "s3cret" not in finished.output + finished.log + str(finished.events)


def test_webhook_that_is_away_changes_no_exit_code(project: Project) -> None:
    """It is a line on the terminal, after which the stage that failed is named as ever."""
    with webhook() as hook:
        hook.answers = [404]
        finished = dpo(
            "run", str(project.file), "evaluate.min_heldout_pairs=5000",
            store=Path(project.config.store), DPO_WEBHOOK_URL=hook.url,
        )  # fmt: skip

    assert finished.code == 2, finished.output
    assert "failed, and nobody was told: the webhook answers 404" in finished.output
    assert "Failed in evaluate" in finished.output
