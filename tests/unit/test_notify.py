"""A webhook is told how a pipeline's run ended. The server is a real one; MLflow is a SQLite file."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_train.config import RunConfig, to_text
from dpo_train.notify import URL_VARIABLE, Found, Notice, look, notice_of, notify, payload, post
from tests.tiny import tiny_config
from tests.webhook import SECRET_PATH, Webhook, webhook

KUBEFLOW_RUN = "5e0c3c1e-0000-4000-8000-000000000001"
QUICK = (0.01, 0.01)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as server:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        yield server


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> RunConfig:
    return tiny_config(tmp_path, model__path=str(model_folder))


def found(**tags: str) -> Found:
    return Found(
        run_id="r1",
        url="http://mlflow/#/experiments/1/runs/r1",
        is_running=False,
        tags={key.replace("__", "."): value for key, value in tags.items()},
        metrics={"heldout/accuracy": 0.8, "heldout/accuracy_low": 0.7, "heldout/accuracy_high": 0.9},
    )


@pytest.mark.parametrize("outcome", ["refused", "unchanged", "registered", "promoted"])
@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "RUNNING"])
def test_outcome_is_what_the_run_has_left_in_mlflow(state: str, outcome: str) -> None:
    """kfp.local says SUCCEEDED, Kubeflow's server COMPLETE, and RUNNING where a branch was skipped."""
    notice = notice_of("nightly", state, found(dpo__outcome=outcome, dpo__why="because", dpo__version="tiny/3"))

    assert (notice.outcome, notice.message, notice.model_version) == (outcome, "because", "tiny/3")


@pytest.mark.parametrize(
    ("state", "mlflow", "error", "message"),
    [
        pytest.param("FAILED", found(dpo__error="DataError: no"), "event", "DataError: no", id="MLflow knows why"),
        pytest.param("FAILED", None, "resolve: no such file", "resolve: no such file", id="no MLflow run yet"),
        pytest.param("CANCELED", found(), None, "it left no outcome, and Kubeflow says CANCELED", id="cancelled"),
        pytest.param("RUNNING", found(), None, "it left no outcome, and Kubeflow says RUNNING", id="a task was killed"),
        pytest.param("SUCCEEDED", found(), None, "it left no outcome, and Kubeflow says SUCC", id="nothing was run"),
        pytest.param("FAILED", found(dpo__version="tiny/3"), "late", "late", id="failed after its registration"),
        pytest.param("FAILED", found(dpo__outcome="registered"), "late", "late", id="failed after its outcome"),
    ],
)
def test_everything_else_has_failed(state: str, mlflow: Found | None, error: str | None, message: str) -> None:
    """A run that left no outcome is never green; why it failed comes from whoever knows."""
    notice = notice_of("nightly", state, mlflow, error=error)

    assert notice.outcome == "failed"
    assert notice.message.startswith(message)


def test_registration_is_told_where_what_followed_from_it_was_lost() -> None:
    """MLflow may go away between the version and the outcome: nobody is told that a run failed that did not."""
    notice = notice_of("nightly", "COMPLETE", found(dpo__version="tiny/3", dpo__registered="true"))

    assert notice.outcome == "registered"
    assert notice.message == "tiny/3; whether it was promoted is not known"


def test_json_has_a_version_and_all_that_is_known() -> None:
    """The schema that docs/retraining.md shows."""
    notice = notice_of("nightly", "COMPLETE", found(dpo__outcome="refused", dpo__why="w"), kubeflow_run=KUBEFLOW_RUN)

    assert payload(notice, "json") == {
        "schema_version": 1,
        "outcome": "refused",
        "run_name": "nightly",
        "message": "w",
        "kubeflow_run": KUBEFLOW_RUN,
        "mlflow_run": "r1",
        "mlflow_url": "http://mlflow/#/experiments/1/runs/r1",
        "model_version": None,
        "metrics": {"heldout/accuracy": 0.8, "heldout/accuracy_low": 0.7, "heldout/accuracy_high": 0.9},
    }


def test_slack_message_is_text_in_which_nothing_is_taken_for_markup() -> None:
    """Slack reads &, < and > of a message as its own signs."""
    notice = Notice(outcome="failed", run_name="a&b", message="Got: <none>.", mlflow_url="http://m/r", kubeflow_run="k")

    (text,) = payload(notice, "slack").values()

    assert text == "*dpo: failed* (a&amp;b)\nGot: &lt;none&gt;.\n<http://m/r|MLflow run>, Kubeflow run k"


def test_server_that_fails_once_is_told_at_the_second_attempt(hook: Webhook) -> None:
    """500, then 200."""
    hook.answers = [500]

    assert post(hook.url, {"a": 1}, pauses_seconds=QUICK) is None
    assert (hook.requests, hook.received) == (2, [{"a": 1}])


@pytest.mark.parametrize(("status", "requests"), [(500, 3), (429, 3), (404, 1), (302, 1)])
def test_server_that_refuses_is_told_of_and_asked_again_only_where_that_may_help(
    hook: Webhook, status: int, requests: int
) -> None:
    """An answer of 4xx stays what it is; a redirect is not followed, for the address is a secret of this server's."""
    hook.answers = [status] * 3

    assert post(hook.url, {}, pauses_seconds=QUICK) == f"the webhook answers {status}"
    assert hook.requests == requests


def test_server_that_hangs_is_given_up(hook: Webhook) -> None:
    """The limit is on an attempt as a whole."""
    hook.answers = ["hang"] * 3

    problem = post(hook.url, {}, pauses_seconds=(0.01,), request_seconds=0.5)

    assert problem == "the webhook did not answer within 0.5 s"
    assert hook.requests == 2


def test_nobody_at_the_address_is_said_without_the_address(hook: Webhook) -> None:
    """A refused connection; httpx2's own words would hold the address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        problem = post(f"http://127.0.0.1:{unused.getsockname()[1]}{SECRET_PATH}", {}, pauses_seconds=QUICK)

    assert problem == "the webhook cannot be reached (ConnectError)"


@pytest.mark.parametrize("address", ["hooks.example/x", "ftp://hooks/x", "http://", "http://[::1/x"])
def test_what_is_no_address_is_said(address: str) -> None:
    """It is asked once."""
    assert post(address, {}, pauses_seconds=QUICK) in {
        f"{URL_VARIABLE} holds no address of http:// or https://",
        "the webhook cannot be reached (ConnectError)",
    }


def test_run_in_mlflow_is_found_by_its_kubeflow_run(config: RunConfig, hook: Webhook) -> None:
    """Tags and metrics of the pipeline's run are in what is posted; a run that still runs there is ended."""
    pytest.importorskip("mlflow")
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    tracking.start_pipeline("another", kubeflow_run="other")
    run_id = tracking.start_pipeline("nightly", kubeflow_run=KUBEFLOW_RUN)
    tracking.client.log_metric(run_id, "heldout/accuracy", 0.75)

    notify(to_text(config), "nightly", kubeflow_run=KUBEFLOW_RUN, state="FAILED")

    (told,) = hook.received
    assert (told["outcome"], told["mlflow_run"], told["mlflow_url"]) == ("failed", run_id, None)
    assert told["metrics"] == {"heldout/accuracy": 0.75}
    assert tracking.client.get_run(run_id).info.status == "FAILED"


def test_login_in_mlflow_s_address_is_not_in_the_link(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link goes to everyone in the channel."""
    pytest.importorskip("mlflow")
    from dpo_train import notify as module
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    monkeypatch.setattr(tracking, "uri", "https://me:secret@mlflow.example/base/")

    assert module._page(tracking, "7", "r1") == "https://mlflow.example/base/#/experiments/7/runs/r1"


def test_config_that_cannot_be_read_is_told_by_the_defaults(hook: Webhook) -> None:
    """The pipeline died before it had begun, of the very same mistake."""
    notify("model: [", "nightly", kubeflow_run=KUBEFLOW_RUN, state="FAILED", error="Task failed.")

    (told,) = hook.received
    assert (told["outcome"], told["run_name"]) == ("failed", "nightly")
    assert told["message"].startswith("the config is not valid YAML")


def test_failed_task_s_own_words_come_from_the_command_s_events(
    hook: Webhook, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kfp.local itself only knows that a task failed."""
    events = tmp_path / "events.jsonl"
    events.write_text(json.dumps({"stage": "resolve", "kind": "error", "message": "No data."}) + "\n")
    monkeypatch.setenv("DPO_EVENTS", str(events))

    notify(to_text(config), "nightly", kubeflow_run=KUBEFLOW_RUN, state="FAILED", error="Task x failed.")

    assert [told["message"] for told in hook.received] == ["resolve: No data."]


def test_webhook_that_is_away_fails_nothing_and_is_said_without_its_address(
    config: RunConfig, hook: Webhook, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log and on the terminal."""
    pytest.importorskip("mlflow")
    events = tmp_path / "events.jsonl"
    events.write_text(json.dumps({"stage": "train", "kind": "error", "message": "Loss is NaN."}) + "\n")
    monkeypatch.setenv("DPO_EVENTS", str(events))
    hook.answers = [403]

    notify(to_text(config), "nightly", state="FAILED")

    said = "failed, and nobody was told: the webhook answers 403"
    printed = "".join(capfd.readouterr())
    assert said in printed
    assert json.loads(events.read_text().splitlines()[-1])["text"] == f"note: {said}"
    assert "s3cret" not in printed + events.read_text()


def test_outcome_that_nobody_asked_for_is_not_posted(config: RunConfig, hook: Webhook) -> None:
    """retrain.notify is failed and refused by default."""
    pytest.importorskip("mlflow")
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    run_id = tracking.start_pipeline("nightly", kubeflow_run=KUBEFLOW_RUN)
    tracking.set_tags(run_id, {"dpo.outcome": "registered"})

    notify(to_text(config), "nightly", kubeflow_run=KUBEFLOW_RUN, state="COMPLETE")
    notify(to_text(config), "n", overrides=["retrain.notify=[registered]"], kubeflow_run=KUBEFLOW_RUN, state="COMPLETE")

    assert [told["run_name"] for told in hook.received] == ["n"]


@pytest.mark.parametrize(("state", "posts"), [("COMPLETE", 0), ("FAILED", 1)])
def test_mlflow_that_is_away_is_said_and_a_failure_is_told_all_the_same(
    config: RunConfig, hook: Webhook, capfd: pytest.CaptureFixture[str], state: str, posts: int
) -> None:
    """What came of a run that went well is not known then, and nothing is made up."""
    pytest.importorskip("mlflow")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tracking.uri=http://127.0.0.1:{unused.getsockname()[1]}"

        notify(to_text(config), "n", overrides=[address], kubeflow_run=KUBEFLOW_RUN, state=state)

    assert len(hook.received) == posts
    assert ("is not known, and nobody is told" in capfd.readouterr().out) == (posts == 0)


def test_without_a_webhook_nothing_is_looked_up(
    config: RunConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop's run costs no look into MLflow."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)

    notify(to_text(config), "nightly", kubeflow_run=KUBEFLOW_RUN, state="SUCCEEDED")

    assert capfd.readouterr().out == f"SUCCEEDED; {URL_VARIABLE} is not set: nobody is told\n"
    assert not Path(config.store).parent.joinpath("mlflow.db").exists()


def test_no_run_is_no_problem(config: RunConfig) -> None:
    """The pipeline died before it opened one."""
    pytest.importorskip("mlflow")

    assert look(config, KUBEFLOW_RUN) == (None, None)
