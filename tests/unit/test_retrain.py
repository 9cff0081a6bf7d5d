"""Runs that come again: whether there is anything to do, what is started from, who becomes the champion.

The registry is MLflow's, over a SQLite file; outputs are real ones, of which the stages' own work is left out.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from dpo_train import registry, retrain, storage
from dpo_train.artifacts import Artifact, Output, Summary, open_artifact
from dpo_train.config import RetrainConfig, RunConfig, parse_config, to_text
from dpo_train.data.folder import weights_digest
from dpo_train.errors import DataError, ModelError
from dpo_train.launch import metadata
from dpo_train.preflight import data_digest, use_storage
from dpo_train.registry import PASSED_TAG, POLICY_TAG, RegisteredVersion
from dpo_train.report_file import REPORT_JSON, SCHEMA_VERSION
from dpo_train.resolving import resolve
from dpo_train.stages.common import make, model_digest
from dpo_train.tracking import Tracking
from tests.projects import Project, project
from tests.tiny import tiny_config, write_pairs

__all__ = ["project"]

NAME = "tiny"


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """MLflow takes seconds to make its tables; a copy of the file takes none."""
    folder = tmp_path_factory.mktemp("mlflow")
    Tracking(tiny_config(folder, model__path=str(model_folder))).check()
    return folder / "mlflow.db"


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, empty_mlflow: Path) -> Iterator[RunConfig]:
    """Nothing was trained yet."""
    before = storage.options()
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    made = tiny_config(
        tmp_path, model__path=str(model_folder), register__model_name=NAME, storage__cache=str(tmp_path / "cache")
    )
    use_storage(made)
    yield with_retrain(made, promote="if_better", when="new_data")
    storage.use(before)


def with_retrain(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, retrain=replace(config.retrain, **changes))


def version_of(config: RunConfig, policy: str, *, passed: bool = True, data: str | None = None) -> str:
    """A version without files."""
    client = Tracking(config).client
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    tags = {POLICY_TAG: policy, PASSED_TAG: str(passed).lower()} | ({"dpo.data": data} if data else {})
    return str(client.create_model_version(NAME, f"file:///{policy}", tags=tags).version)


def champion_is(config: RunConfig) -> str | None:
    found = retrain.find_champion(config, Tracking(config))
    return None if found is None else found.version


def registered(config: RunConfig, version: str | None, reason: str = "") -> Artifact:
    """The output of the stage register; version None: the gate refused."""
    details = {"registered": version is not None, "model_name": NAME, "version": version, "reason": reason}
    return make(config, "register", details, {}, lambda _: Summary(details=details), output=None)


def report(config: RunConfig, champion: dict[str, str] | None, low: float | None = None) -> Artifact:
    """The output of evaluate, with the comparison that decides."""
    difference = {"value": None if low is None else low + 0.1, "low": low, "high": None if low is None else low + 0.2}
    paired = None if champion is None else {"difference": {**difference, "n": 50}}
    content = {"findings": {"champion": champion, "heldout": {"champion": paired}}, "schema_version": SCHEMA_VERSION}

    def body(out: Output) -> Summary:
        out.write_json(REPORT_JSON, {**content, "verdict": {}, "samples": [], "identity": {}})
        return Summary()

    return make(config, "evaluate", content, {}, body, output=None)


def settle(config: RunConfig, version: str, against: dict[str, str] | None, low: float | None) -> retrain.Settled:
    return retrain.settle(config, Tracking(config), registered(config, version), report(config, against, low))


def against(version: str, policy: str) -> dict[str, str]:
    return {"name": NAME, "version": version, "digest": policy}


def test_first_version_that_passed_becomes_the_champion(config: RunConfig) -> None:
    """There is nothing to compare it with."""
    version = version_of(config, "p1")

    settled = settle(config, version, None, None)

    assert settled == retrain.Settled(
        outcome="promoted", why="tiny version 1 is the champion now: there was none", promoted=True
    )
    assert champion_is(config) == "1"


@pytest.mark.parametrize(
    ("low", "is_promoted"), [(0.01, True), (0.0, False), (-0.05, False), (-0.5, False), (None, False)]
)
def test_later_version_is_promoted_if_the_whole_interval_is_better(
    config: RunConfig, low: float | None, is_promoted: bool
) -> None:
    """An interval that reaches zero is no better; neither is a number that could not be measured."""
    settle(config, version_of(config, "p1"), None, None)
    version = version_of(config, "p2")

    settled = settle(config, version, against("1", "p1"), low)

    assert (settled.promoted, champion_is(config)) == (is_promoted, "2" if is_promoted else "1")
    assert settled.outcome == ("promoted" if is_promoted else "registered")
    if low is not None:
        assert f"({low:+.3f} to {low + 0.2:+.3f}) against tiny version 1 on the same 50 held-out pairs" in settled.why


def test_settled_twice_is_settled_once(config: RunConfig) -> None:
    """A task that is run again finds its version the champion."""
    version = version_of(config, "p1")
    settle(config, version, None, None)

    again = settle(config, version, None, None)

    assert (again.outcome, again.promoted) == ("registered", True)
    assert champion_is(config) == "1"


def test_champion_that_was_taken_back_does_not_come_again_by_itself(config: RunConfig) -> None:
    """A person went back from version 2; the same data make the same version the next night, and it stays there."""
    settle(config, version_of(config, "p1"), None, None)
    second = version_of(config, "p2")
    settle(config, second, against("1", "p1"), 0.1)
    registry.rollback(Tracking(config).client, NAME)

    settled = settle(config, second, against("1", "p1"), 0.1)

    assert (settled.promoted, champion_is(config)) == (False, "1")
    assert "taken back" in settled.why


@pytest.mark.parametrize("compared", [None, against("1", "p1")], ids=["with none", "with the one before"])
def test_champion_that_came_meanwhile_is_not_replaced_uncompared(
    config: RunConfig, compared: dict[str, str] | None
) -> None:
    """Somebody promoted version 2 while version 3 was trained."""
    for policy in ("p1", "p2"):
        registry.promote(Tracking(config).client, NAME, version_of(config, policy))

    settled = settle(config, version_of(config, "p3"), compared, 0.3)

    assert (settled.promoted, champion_is(config)) == (False, "2")
    assert "and the champion is tiny version 2" in settled.why


def test_same_policy_under_another_number_is_compared_as_the_policy_that_it_is(config: RunConfig) -> None:
    """A report that was reused names the version that had this policy then."""
    for policy in ("p1", "p1"):
        registry.promote(Tracking(config).client, NAME, version_of(config, policy))

    assert settle(config, version_of(config, "p2"), against("1", "p1"), 0.1).promoted
    assert not settle(config, version_of(config, "p2"), against("1", "p1"), 0.1).promoted  # the champion's own policy


def test_refusal_and_promotion_by_hand_touch_no_alias(config: RunConfig) -> None:
    """What came of the run is said all the same."""
    tracking, by_hand = Tracking(config), with_retrain(config, promote="by_hand")
    some = report(config, None)
    version = version_of(config, "p1")

    refused = retrain.settle(config, tracking, registered(config, None, "margin failed"), some)
    left = retrain.settle(by_hand, tracking, registered(by_hand, version), some)

    assert refused.tags == {"dpo.outcome": "refused", "dpo.why": "margin failed", "dpo.promoted": "false"}
    assert left.tags == {"dpo.outcome": "registered", "dpo.why": "tiny version 1"}
    assert champion_is(config) is None


def test_promotion_under_way_is_waited_for(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the lock lets go of it; what it did in the meantime is looked at anew."""
    monkeypatch.setattr(retrain, "POLL_SECONDS", 0.05)
    version = version_of(config, "p1")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        from dpo_train.registry.lock import locked

        with locked(Tracking(config).client, NAME):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    monkeypatch.setattr(retrain.time, "sleep", lambda _: done.set())
    settled = settle(config, version, None, None)
    holder.join()

    assert settled.promoted
    assert champion_is(config) == "1"


def test_promotion_under_way_for_too_long_fails_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version stays registered."""
    from dpo_train.registry.lock import locked

    monkeypatch.setattr(retrain, "LOCK_SECONDS", 0.0)
    version = version_of(config, "p1")

    client = Tracking(config).client

    with locked(client, NAME), pytest.raises(registry.LockedError, match=f"aliases of {NAME} are being changed"):
        settle(config, version, None, None)

    assert [str(found.version) for found in client.search_model_versions(f"name = '{NAME}'")] == [version]
    assert champion_is(config) is None


def test_same_data_as_the_champion_s_is_nothing_to_do(config: RunConfig) -> None:
    """The MLflow run is a finished one that says so."""
    tracking = Tracking(config)
    registry.promote(tracking.client, NAME, version_of(config, "p1", data=data_digest(config)))

    found = resolve(to_text(config), "nightly", kubeflow_run="k-1")

    run = tracking.client.get_run(found.run_id)
    assert found.decision == "unchanged"
    assert run.info.status == "FINISHED"
    assert run.data.tags["dpo.outcome"] == "unchanged"
    assert run.data.tags["dpo.why"] == "the champion, tiny version 1, was made of the same data: nothing is trained"


@pytest.mark.parametrize(
    ("when", "data", "why"),
    [
        ("new_data", "other", "the data are not the champion's"),
        ("new_data", None, "what data the champion was made of is not known"),
        ("always", "same", "retrain.when=always"),
    ],
)
def test_anything_else_is_trained(config: RunConfig, when: str, data: str | None, why: str) -> None:
    """And the config for later tasks names the champion by its number."""
    data = data_digest(config) if data == "same" else data
    registry.promote(Tracking(config).client, NAME, version_of(config, "p1", data=data))

    found = retrain.resolve(with_retrain(config, when=when), Tracking(config))

    assert (found.decision, found.why) == ("train", why)
    assert found.config.evaluate.champion == "1"
    assert found.config.model == config.model


def test_data_of_a_version_without_a_tag_come_from_the_run_that_made_it(config: RunConfig) -> None:
    """The stage's run lies below the pipeline's, which has the tag."""
    tracking = Tracking(config)
    parent = tracking.start_run("pipeline", tags={"dpo.data": "d1"})
    stage = tracking.start_run("register", parent=parent)
    tracking.client.create_registered_model(NAME)
    tracking.client.create_model_version(NAME, "file:///x", run_id=stage)
    found = registry.champion(tracking.client, NAME, "1")
    assert found is not None

    assert retrain.data_of(tracking, found) == "d1"


def test_without_a_champion_later_tasks_look_for_none(config: RunConfig) -> None:
    """One that comes meanwhile changes nothing; rules about a champion may stand in the config all the same."""
    overrides = ["train.beta=0.3", "evaluate.gate.max_set_loss=0.05"]
    found = resolve(to_text(config), "nightly", overrides=overrides)
    handed_on = parse_config(found.config)

    assert found.decision == "train"
    assert (handed_on.evaluate.champion, handed_on.train.beta) == ("none", 0.3)
    assert found.data_digest == data_digest(config)


def test_training_starts_from_the_champion_where_every_task_finds_it(project: Project) -> None:
    """Its folder is an output of the store, in which an adapter is merged and SFT has been done."""
    config = with_retrain(project.config, start="champion")
    config = replace(config, sft=replace(config.sft, enabled=True))
    tracking = Tracking(config)
    champion = retrain.find_champion(config, tracking)
    assert champion is not None

    first, second = (retrain.resolve(config, tracking).config for _ in range(2))

    folder = Path(first.model.path)
    assert folder.is_relative_to(config.store)
    made = open_artifact(folder.parent)
    assert (made.address, metadata(made)["summary"]) == (f"champion/{made.record.digest}", "dpo-policy version 1")
    assert first == second
    assert not first.sft.enabled
    fetched = registry.fetch(tracking.uri, champion, storage.cache_folder() / "models")
    assert model_digest(first) == weights_digest(fetched) == made.record.details["model"]
    shutil.rmtree(folder.parent)


def test_config_that_was_handed_on_can_be_run_again(config: RunConfig) -> None:
    """`dpo reproduce` gives it to a pipeline: what is nailed down stays so."""
    first = resolve(to_text(config), "nightly")
    registry.promote(Tracking(config).client, NAME, version_of(config, "p1"))

    again = resolve(first.config, "again")

    assert (again.decision, again.config) == ("train", first.config)


def test_start_from_the_champion_without_one_is_the_config_s_model(config: RunConfig) -> None:
    """The first night."""
    found = retrain.resolve(with_retrain(config, start="champion"), Tracking(config))

    assert found.config.model == config.model


def test_failed_look_at_the_inputs_shows_in_mlflow(config: RunConfig, tmp_path: Path) -> None:
    """A schedule whose data are gone must not leave MLflow as if there were no schedule."""
    (tmp_path / "pairs.jsonl").unlink()

    with pytest.raises(DataError):
        resolve(to_text(config), "nightly", kubeflow_run="k-9")

    tracking = Tracking(config)
    run_id = tracking.find_child(None, "dpo.kubeflow_run", "k-9")
    run = tracking.client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["dpo.error"].startswith("DataError: ")


def test_missing_model_is_told_where_it_would_be_trained(config: RunConfig, tmp_path: Path) -> None:
    """Before any other task runs."""
    write_pairs(tmp_path / "pairs.jsonl", 20)
    gone = replace(config, model=replace(config.model, path=str(tmp_path / "gone")))

    with pytest.raises(ModelError, match="no model folder"):
        retrain.resolve(gone, Tracking(gone))


def test_rule_knows_no_registry(config: RunConfig) -> None:
    """It is a function of two versions and a report's findings."""
    del config
    ours, theirs = (
        RegisteredVersion(name=NAME, version=number, place=number, tags={POLICY_TAG: f"p{number}"}) for number in "21"
    )
    paired = {"difference": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40}}
    findings = json.loads(json.dumps({"champion": against("1", "p1"), "heldout": {"champion": paired}}))

    assert retrain.better(ours, theirs, findings)[0]
    assert not retrain.better(theirs, ours, findings)[0]
    assert RetrainConfig().promote == "by_hand"
