"""Every stage on a real server: the same outputs as on local paths, cut, throttled and torn as the network may be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_train import launch, storage
from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.config import RunConfig
from dpo_train.data.known import KEYS_FILE
from dpo_train.errors import StorageUnavailableError, StoreError
from dpo_train.progress import ENVIRONMENT_KEY, Follower
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess, TableFunction
from dpo_train.stages.sweep import chosen_config
from dpo_train.storage import client
from tests.s3.flow import Counting, Steps, contents, copy_up, machine, numbers, outputs
from tests.s3.proxy import Proxy
from tests.s3.server import Server
from tests.tiny import tiny_config

LOCAL = InProcess()
STAGES = ("prepare", "score_reference", "train", "evaluate")


def mostly_slow(*quick: str) -> list[Any]:
    """All stages, of which ``make test`` runs these."""
    return [pytest.param(stage, marks=() if stage in quick else pytest.mark.slow) for stage in STAGES]


Made = dict[str, Artifact]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("stages")
    return tiny_config(folder, sweep__betas=[0.1, 0.3], sweep__max_steps=3, register__model_name="tiny")


@pytest.fixture(scope="module")
def made(config: RunConfig) -> Made:
    """The whole flow on local paths."""
    return dict(launch.run(config).artifacts)


def in_bucket(server: Server, name: str, config: RunConfig, cache: Path) -> RunConfig:
    """The same with an empty store in a bucket of its own; data and model stay here."""
    return machine(replace(config, store=f"{server.bucket(name)}/a/store"), cache)


def run_one(stage: str, config: RunConfig, made: Made, executor: InProcess = LOCAL, **more: Any) -> Artifact:
    """One stage that reads outputs made before."""
    if stage == "prepare":
        return prepare(config, executor)
    if stage == "score_reference":
        return score_reference(config, made["prepare"], executor)
    if stage == "train":
        return train(chosen_config(config, made["sweep"]), made["score_reference"], executor, **more)
    return evaluate(config, made["score_reference"], made["train"], executor)


def inputs_in(server: Server, config: RunConfig, made: Made) -> Made:
    """The local outputs, copied into the bucket's store: an address holds in any store."""
    found = dict(made)
    for name in ("prepare", "score_reference", "train"):
        home = storage.join(config.store, made[name].address)
        copy_up(server, made[name].path, home)
        found[name] = replace(made[name], home=home)
    return found


def drop(server: Server, artifact: Artifact) -> None:
    """Takes an output out of its bucket."""
    bucket, _, prefix = artifact.home.removeprefix("s3://").partition("/")
    for key in server.objects(bucket):
        if key.startswith(prefix):
            server.client().delete_object(Bucket=bucket, Key=key)


def assert_same(here: Artifact, there: Artifact) -> None:
    """Numbers, files and weights of two makings of one stage; how much was left to score may differ."""
    assert {**numbers(there), "newly_scored": 0} == {**numbers(here), "newly_scored": 0}
    assert there.record.files.keys() == here.record.files.keys()
    assert contents(there, ".parquet", ".safetensors") == contents(here, ".parquet", ".safetensors")


def test_the_whole_flow_is_the_same_in_a_bucket(
    s3_server: Server, proxied: Proxy, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """Data, model and store at s3://: every number as on local paths, no scratch left, and each file is moved once."""
    root = s3_server.bucket("flow")
    copy_up(s3_server, Path(config.model.path), f"{root}/in/model")
    data = Path(config.prepare.path or "").read_bytes()
    s3_server.client().put_object(Bucket="flow", Key="in/data/pairs.jsonl", Body=data)
    remote = replace(
        machine(replace(config, store=f"{root}/a/store"), tmp_path / "one"),
        model=replace(config.model, path=f"{root}/in/model"),
        prepare=replace(config.prepare, path=f"{root}/in/data/pairs.jsonl"),
        tracking=replace(config.tracking, uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )

    first = launch.run(remote)

    for stage, artifact in first.artifacts.items():
        assert not artifact.reused
        assert numbers(artifact) == numbers(made[stage]), stage
        assert artifact.record.files.keys() == made[stage].record.files.keys()
    assert contents(first.artifacts["train"], ".safetensors") == contents(made["train"], ".safetensors")
    assert first.report.read_text().startswith("<!doctype html>")
    objects = outputs(s3_server, "flow", "a/store/")
    listed = {
        f"{artifact.address}/{name}"
        for artifact in first.artifacts.values()
        for name in (*artifact.record.files, "claim.json", "record.json")
    }
    # What a trial measured lies there too; a sweep with another rule finds it again.
    assert {name for name in objects if not name.startswith("trial/")} == listed
    assert s3_server.unfinished("flow") == []
    assert not any(b"test-secret" in body for body in objects.values())
    assert not any(b"test-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    proxied.clear()
    assert all(artifact.reused for artifact in launch.run(remote).artifacts.values())
    assert proxied.count("PUT", "") == 0
    assert proxied.count("GET", r"parquet|safetensors") == 0
    # For each of seven stages its record and a listing of the model; before them data, model, store; the report.
    assert proxied.count("*", "") < 34

    elsewhere = launch.run(machine(remote, tmp_path / "two")).artifacts
    assert all(artifact.reused for artifact in elsewhere.values())
    assert storage.cache_folder() == tmp_path / "two"
    for stage, artifact in elsewhere.items():
        assert artifact.path.is_relative_to(tmp_path / "two")
        assert contents(artifact, "") == contents(first.artifacts[stage], "")


def test_interrupted_scoring_goes_on_on_another_machine(
    direct: Server, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """200 pairs in 13 units, of which five are done and published: the other machine scores the other eight."""
    remote = in_bucket(direct, "units", config, tmp_path / "one")
    inputs = inputs_in(direct, remote, made)
    drop(direct, replace(inputs["score_reference"], home=storage.join(remote.store, "score_reference")))
    whole = made["score_reference"].record.counts
    with pytest.raises(KeyboardInterrupt):
        run_one("score_reference", remote, inputs, Counting(stop_after=5))
    (home,) = {key.split("/units/")[0] for key in direct.objects("units") if "/units/" in key}
    with pytest.raises(StoreError, match=r"is not complete \(its stage was interrupted\)"):
        open_artifact(f"s3://units/{home}")

    rest = Counting()
    finished = run_one("score_reference", machine(remote, tmp_path / "two"), inputs, rest)

    assert (whole["newly_scored"], finished.record.counts["newly_scored"], rest.tasks) == (200, 120, 8)
    assert contents(finished, ".parquet") == contents(made["score_reference"], ".parquet")
    assert not any("/units/" in key for key in direct.objects("units"))


def test_scoring_survives_what_it_may_not_remove(
    s3_server: Server, proxied: Proxy, config: RunConfig, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that may write and not delete: the output is complete, its units stay, and that is said."""
    events = Follower(tmp_path / "events")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events"))
    remote = in_bucket(s3_server, "keep", config, tmp_path / "one")
    inputs = inputs_in(s3_server, remote, made)
    drop(s3_server, inputs["score_reference"])
    proxied.fault("DELETE", "", "denied")
    assert_same(made["score_reference"], run_one("score_reference", remote, inputs))
    assert any("/units/" in key for key in s3_server.objects("keep"))
    (said,) = [event["text"] for event in events.new() if "could not be removed" in event.get("text", "")]
    assert f"{inputs['score_reference'].home}/units" in said


def test_of_an_earlier_output_only_what_is_wanted_is_fetched(
    s3_server: Server, proxied: Proxy, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """New data alone: a list of keys comes down and no shard. With one old record: the one shard that holds it."""
    data = tmp_path / "new.jsonl"
    record = {"prompt": "question 1000", "chosen": "kind", "rejected": "rude"}
    old = Path(config.prepare.path or "").read_text().splitlines(keepends=True)[0]
    for place, (lines, fetched) in enumerate((("", 0), (old, 1))):
        data.write_text("".join(json.dumps({**record, "conversation": f"new {i}"}) + "\n" for i in range(1)) + lines)
        remote = in_bucket(s3_server, f"wanted{place}", config, tmp_path / str(place))
        earlier = inputs_in(s3_server, remote, made)["score_reference"]
        remote = replace(remote, prepare=replace(remote.prepare, path=str(data)))
        pairs = run_one("prepare", remote, {})
        proxied.clear()
        finished = score_reference(remote, pairs, LOCAL)
        assert finished.record.counts["newly_scored"] == 1
        assert proxied.count("GET", f"{earlier.address}/{KEYS_FILE}") == 1
        assert proxied.count("GET", f"{earlier.address}/.*-.*parquet") == fetched


def test_workers_of_an_evaluation_fetch_the_policy_themselves(
    direct: Server, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """They have disks of their own: what lies on the disk of the one that starts them is not there."""
    remote = in_bucket(direct, "apart", config, tmp_path / "driver")
    inputs = inputs_in(direct, remote, made)
    drop(direct, replace(made["evaluate"], home=storage.join(remote.store, made["evaluate"].address)))
    assert_same(made["evaluate"], run_one("evaluate", remote, inputs, OwnDisk(tmp_path / "driver", tmp_path / "away")))


class OwnDisk(InProcess):
    """While a worker works, the cache of the one that started it is away."""

    def __init__(self, cache: Path, away: Path) -> None:
        self._cache, self._away = cache, away

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        self._cache.rename(self._away)
        found = list(super().map_tables(make, tables, uses_model=uses_model))
        shutil.rmtree(self._cache, ignore_errors=True)  # a worker that fetched nothing has made none
        self._away.rename(self._cache)
        yield from found


def test_interrupted_training_goes_on_on_another_machine(
    direct: Server, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """Cut at step 13, the checkpoint of step 10 lies in the bucket: steps 11 to 20 follow, to the same bits."""
    remote = in_bucket(direct, "cut", config, tmp_path / "one")
    inputs = inputs_in(direct, remote, made)
    drop(direct, inputs["train"])
    with pytest.raises(KeyboardInterrupt):
        run_one("train", remote, inputs, reporter=Steps(stop_at=13))
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(inputs["train"].home)

    steps = Steps()
    finished = run_one("train", machine(remote, tmp_path / "two"), inputs, reporter=steps)

    assert steps.seen == list(range(11, 21))
    assert_same(made["train"], finished)
    assert not any("/checkpoints/" in key for key in direct.objects("cut"))


@pytest.mark.slow
def test_a_checkpoint_whose_last_file_is_missing_does_not_count(
    s3_server: Server, proxied: Proxy, config: RunConfig, made: Made, tmp_path: Path
) -> None:
    """The shard of step 10 arrives and its training.json never: the other machine goes on from step 5."""
    remote = in_bucket(s3_server, "half", config, tmp_path / "one")
    inputs = inputs_in(s3_server, remote, made)
    drop(s3_server, inputs["train"])
    storage.use(replace(storage.options(), attempts=2))
    remote = replace(remote, storage=replace(remote.storage, attempts=2))
    proxied.fault("PUT", "step-00000010/training.json", "slow_down")
    with pytest.raises(StorageUnavailableError, match=r"step-00000010/training\.json"):
        run_one("train", remote, inputs)
    assert any("step-00000010/shard-0" in key for key in s3_server.objects("half"))
    proxied.clear()

    steps = Steps()
    finished = run_one("train", machine(remote, tmp_path / "two"), inputs, reporter=steps)

    assert steps.seen == list(range(6, 21))
    assert_same(made["train"], finished)
    assert not any("/checkpoints/" in key for key in s3_server.objects("half"))


@pytest.mark.parametrize("stage", mostly_slow("score_reference"))
def test_without_its_record_nothing_counts_and_nothing_is_done_twice(
    s3_server: Server, proxied: Proxy, config: RunConfig, made: Made, tmp_path: Path, stage: str
) -> None:
    """The record, and it alone, never arrives: not complete, exit code 1. The next run, elsewhere, completes it."""
    remote = in_bucket(s3_server, "record", config, tmp_path / "one")
    inputs = inputs_in(s3_server, remote, made)
    here = made[stage]
    home = storage.join(remote.store, here.address)
    drop(s3_server, replace(here, home=home))
    hasty = replace(remote, storage=replace(remote.storage, attempts=2))
    storage.use(replace(storage.options(), attempts=2))
    proxied.fault("PUT", f"{here.address}/record.json", "cut_upload")
    with pytest.raises(StorageUnavailableError, match=r"record\.json") as caught:
        run_one(stage, hasty, inputs)
    assert caught.value.exit_code == 1
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(home)
    assert {f"{here.address}/{name}" for name in here.record.files} <= outputs(s3_server, "record", "a/store/").keys()
    proxied.clear()

    again, steps = Counting(), Steps()
    more = {"reporter": steps} if stage == "train" else {}
    finished = run_one(stage, machine(remote, tmp_path / "two"), inputs, again, **more)

    assert not finished.reused
    assert_same(here, finished)
    if stage in {"score_reference", "train"}:
        assert (again.tasks, steps.seen) == (0, [])


@pytest.mark.parametrize("stage", mostly_slow("prepare", "train"))
def test_a_stage_survives_a_bad_network(
    s3_server: Server,
    proxied: Proxy,
    config: RunConfig,
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Throttled, reset in the middle of bodies, stalled, answers lost, uploads cut, listings empty: the same output."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 1.0)
    remote = in_bucket(s3_server, "bad", config, tmp_path / "one")
    inputs = inputs_in(s3_server, remote, made)
    here = made[stage]
    drop(s3_server, replace(here, home=storage.join(remote.store, here.address)))
    faults = {
        ("GET", "list-type"): "empty_listing",
        ("PUT", "claim.json"): "lost_answer",
        ("PUT", "record.json"): "cut_upload",
        ("PUT", r"parquet|safetensors|arrow"): "cut_upload",
        ("PUT", "json"): "slow_down",
        ("GET", "claim.json"): "reset",
        ("GET", r"shards.json|adapter_config"): "truncate",
        ("GET", r"parquet|safetensors"): "stall",
        ("GET", "record.json"): "internal_error",
        ("DELETE", ""): "lost_answer",
    }
    for (method, path), kind in faults.items():
        proxied.fault(method, path, kind, None if kind == "empty_listing" else 2)  # type: ignore[arg-type]

    finished = run_one(stage, remote, inputs)

    assert_same(here, finished)
    hit = {seen.kind for seen in proxied.seen} - {""}
    wanted = {"slow_down", "cut_upload", "lost_answer", "internal_error", "empty_listing", "reset"}
    assert hit >= (wanted if stage == "prepare" else wanted | {"truncate", "stall"})
    assert s3_server.unfinished("bad") == []
    scratch = ("/work/", "/units/", "/checkpoints/")
    assert not any(part in key for key in s3_server.objects("bad") for part in scratch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "method", "path"),
    [
        ("prepare", "PUT", "prepare/.*arrow"),
        ("score_reference", "PUT", "units/"),
        ("train", "PUT", "shard-0-of-1"),
        ("evaluate", "GET", "heldout"),
    ],
)
def test_a_fault_that_does_not_end_is_an_error_and_no_output(
    s3_server: Server,
    proxied: Proxy,
    config: RunConfig,
    made: Made,
    tmp_path: Path,
    stage: str,
    method: str,
    path: str,
) -> None:
    """Exit code 1 with the address; no record; and once the fault is over the same call completes."""
    remote = in_bucket(s3_server, "ever", config, tmp_path / "one")
    inputs = inputs_in(s3_server, remote, made)
    here = made[stage]
    home = storage.join(remote.store, here.address)
    drop(s3_server, replace(here, home=home))
    hasty = replace(remote, storage=replace(remote.storage, attempts=2))
    storage.use(replace(storage.options(), attempts=2))
    proxied.fault(method, path, "slow_down")
    with pytest.raises(StorageUnavailableError, match=r"s3://ever/a/store/.* in 2 attempts") as caught:
        run_one(stage, hasty, inputs)
    assert caught.value.exit_code == 1
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(home)
    proxied.clear()

    assert_same(here, run_one(stage, remote, inputs))
