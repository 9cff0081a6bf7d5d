"""The command line with everything at s3://: what it prints, its exit codes, and what it refuses before it starts."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from dpo_train import storage
from dpo_train.artifacts import open_artifact
from dpo_train.cli import main
from dpo_train.config import RunConfig
from dpo_train.errors import StoreError
from tests.command import dpo, start, write_config
from tests.s3.flow import copy_up, machine
from tests.s3.server import Server
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Model and data on this disk."""
    return tiny_config(tmp_path_factory.mktemp("command"))


@pytest.fixture
def config(direct: Server, here: RunConfig, tmp_path: Path) -> RunConfig:
    """Everything in a bucket, read and written with this folder's cache."""
    root = direct.bucket("command")
    copy_up(direct, Path(here.model.path), f"{root}/in/model")
    data = Path(here.prepare.path or "").read_bytes()
    direct.client().put_object(Bucket="command", Key="in/pairs.jsonl", Body=data)
    remote = replace(
        here,
        store=f"{root}/store",
        model=replace(here.model, path=f"{root}/in/model"),
        prepare=replace(here.prepare, path=f"{root}/in/pairs.jsonl"),
        tracking=replace(here.tracking, uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
        storage=replace(here.storage, attempts=2),
    )
    return machine(remote, tmp_path / "cache")


def refusal(config: RunConfig, folder: Path, capfd: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line of a command that is refused with exit code 2."""
    file = write_config(config, folder / "run.yaml")
    code = main([command[0], str(file), *command[1:]])
    text = capfd.readouterr()
    assert (code, text.out) == (2, ""), text
    assert text.err.startswith("dpo: ")
    assert text.err.count("\n") == 1
    assert "Traceback" not in text.err
    return text.err


COMMANDS = [("run",), ("prepare",), ("train",)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_missing_bucket_is_one_line(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: tuple[str]
) -> None:
    """Named with what to check; nothing is started."""
    text = refusal(replace(config, store="s3://no-such-bucket-here/store"), tmp_path, capfd, *command)
    assert "s3://no-such-bucket-here/store: the bucket does not exist" in text
    assert "What to do: check its name and storage.endpoint, or create it." in text


def test_places_that_are_not_there_are_one_line(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The data, the model, an input and the place for an output."""
    moved = replace(config, prepare=replace(config.prepare, path="s3://command/in/missing.jsonl"))
    assert "s3://command/in/missing.jsonl" in refusal(moved, tmp_path, capfd, "run")
    moved = replace(config, model=replace(config.model, path="s3://command/in/nothing"))
    assert "There is no model at s3://command/in/nothing" in refusal(moved, tmp_path, capfd, "run")
    given = ("--pairs", "s3://command/store/prepare/0123")
    assert "s3://command/store/prepare/0123 holds no output" in refusal(
        config, tmp_path, capfd, "score-reference", *given
    )
    output = ("--output", "s3://no-such-bucket-here/out")
    assert "the bucket does not exist" in refusal(config, tmp_path, capfd, "prepare", *output)


def test_a_store_in_a_bucket_needs_an_address_for_mlflow(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bucket cannot hold MLflow's database: before anything starts, with what to set."""
    bare = replace(config, tracking=replace(config.tracking, uri=None))
    for command in ("run", "prepare", "train"):
        text = refusal(bare, tmp_path, capfd, command)
        assert "set tracking.uri or MLFLOW_TRACKING_URI to a server, or to sqlite:////a/path/mlflow.db" in text


def test_garbage_in_a_bucket_is_not_collected(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who else uses the outputs cannot be known; it says what to do instead."""
    text = refusal(config, tmp_path, capfd, "gc")
    assert "What others use of s3://command/store cannot be seen from here" in text
    assert "lifecycle rule" in text


@contextmanager
def _as_user(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, *actions: str) -> Iterator[None]:
    keys = server.user(name, *actions)
    with monkeypatch.context() as patch, server.enforcing():
        for variable, value in keys.items():
            patch.setenv(variable, value)
        yield


def test_permissions_that_lack_are_one_line_each(
    direct: Server,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Unknown keys, no right to write, no right to read: what is asked for, and never the keys."""
    for command in ("run", "train"):
        with direct.enforcing():
            text = refusal(config, tmp_path, capfd, command)
        assert "the server does not know this access key" in text
        assert "test-key" not in text
        assert "test-secret" not in text
    with _as_user(direct, monkeypatch, "command-reader", "s3:GetObject", "s3:ListBucket"):
        for command in ("run", "train"):
            text = refusal(config, tmp_path, capfd, command)
            assert "Cannot write s3://command/store: access is denied" in text
            assert "ask for s3:PutObject on it" in text
    with _as_user(direct, monkeypatch, "command-writer", "s3:PutObject"):
        text = refusal(config, tmp_path, capfd, "run")
        assert "Cannot read s3://command/store: access is denied" in text
    assert direct.unfinished("command") == []


def _no_secret_in(*folders: Path) -> bool:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return len(files) > 3 and not any(b"test-secret" in file.read_bytes() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_the_pipeline_runs_in_a_bucket(
    direct: Server, config: RunConfig, tmp_path: Path, executor: Literal["local", "ray"]
) -> None:
    """`dpo run` to its report; the second time everything is reused. Keys reach the workers and no file.

    Server and cache are named by the config alone, so that a worker that was not told of them would fail.
    """
    config = replace(
        config,
        compute=replace(config.compute, executor=executor),
        storage=replace(config.storage, endpoint=direct.endpoint),
    )
    other = {"AWS_ENDPOINT_URL": "", "DPO_CACHE": str(tmp_path / "not used")}
    file = write_config(config, tmp_path / "run.yaml")
    store = tmp_path / "cache" / "s3" / "command" / "store"

    first = dpo("run", str(file), store=store, **other)
    assert first.code == 0, first.output
    assert "held-out pairs" in first.output
    assert "outputs lie in s3://command/store" in first.output
    assert all(end["path"].startswith("s3://command/store/") for end in first.ends().values())
    assert not any(end["reused"] for end in first.ends().values())
    again = dpo("run", str(file), store=store, **other)
    assert again.code == 0, again.output
    assert all(end["reused"] for end in again.ends().values())
    assert direct.unfinished("command") == []
    assert _no_secret_in(tmp_path)
    assert not (tmp_path / "not used").exists()
    assert not any(b"test-secret" in body for body in direct.objects("command").values())
    scratch = ("/work/", "/units/", "/checkpoints/")
    assert not any(part in key for key in direct.objects("command") for part in scratch)


@pytest.mark.slow
def test_stages_by_hand_take_and_leave_addresses(direct: Server, config: RunConfig, tmp_path: Path) -> None:
    """`--output` and `--pairs` at s3://, outside of the store."""
    file = write_config(config, tmp_path / "run.yaml")
    made = dpo("prepare", str(file), "--output", "s3://command/by hand/pairs")
    assert made.code == 0, made.output
    scored = dpo(
        "score-reference", str(file), "--pairs", "s3://command/by hand/pairs", "--output", "s3://command/by hand/scored"
    )
    assert scored.code == 0, scored.output
    assert open_artifact("s3://command/by hand/scored", "score_reference").record.counts["pairs"] == 200
    assert not any("store/" in key and "/runs/" not in key for key in direct.objects("command"))


@pytest.mark.slow
def test_a_killed_training_goes_on_on_another_machine(direct: Server, config: RunConfig, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint is in the bucket: another cache goes on from it, to the weights of one go."""
    unbroken = write_config(replace(config, store="s3://command/unbroken"), tmp_path / "unbroken.yaml")
    done = dpo("train", str(unbroken))
    assert done.code == 0, done.output
    file = write_config(config, tmp_path / "run.yaml")
    process = start("train", str(file))
    end = time.monotonic() + 120
    while not (found := [key for key in direct.keys("command") if re.match("store/train/.*/training.json", key)]):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    home = "s3://command/" + found[0].split("/checkpoints/")[0]
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(home)

    elsewhere = machine(config, tmp_path / "elsewhere")
    finished = dpo("train", str(write_config(elsewhere, tmp_path / "elsewhere.yaml")), store=_store(elsewhere))

    assert finished.code == 0, finished.output
    first = next(event for event in finished.events if event["stage"] == "train" and event["kind"] == "progress")
    assert first["done"] > 5
    weights = [key for key in direct.objects("command") if key.endswith("adapter_model.safetensors")]
    contents = {direct.objects("command")[key] for key in weights}
    assert (len(weights), len(contents)) == (2, 1)


def _store(config: RunConfig) -> Path:
    return storage.cache_folder() / config.store.replace("s3://", "s3/")


@pytest.mark.slow
def test_an_error_of_a_rank_comes_through_with_a_store_in_a_bucket(config: RunConfig, tmp_path: Path) -> None:
    """The note that keeps Ray from trying again what would repeat itself lies in the local copy, not at s3://."""
    diverging = replace(
        config,
        train=replace(config.train, learning_rate=1e30, max_grad_norm=1e30),
        compute=replace(config.compute, executor="ray"),
    )
    failed = dpo("train", str(write_config(diverging, tmp_path / "run.yaml")), store=_store(config))
    assert failed.code == 1, failed.output
    assert "Failed in train. The loss is not finite" in failed.output
    assert "Ray" not in failed.output.partition("Failed in train.")[2]
