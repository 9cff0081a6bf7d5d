"""Stages as jobs of a Ray cluster that is there: a real head with its dashboard and a token, and `dpo job` on it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from dpo_train import launch
from dpo_train.artifacts import Artifact
from dpo_train.cluster.job import Job, job_for
from dpo_train.config import RunConfig
from dpo_train.errors import DataError, RunError, UserError
from dpo_train.progress import ENVIRONMENT_KEY, Follower
from tests.command import DPO, start, write_config
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="Ray's dashboard is not installed (ray[default])"
)

TOKEN = "a-token-of-these-tests"
"""Of a head on 127.0.0.1 that ends with the tests."""


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one machine."""

    url: str

    def ask(self, method: str, path: str) -> Any:
        return httpx2.request(method, self.url + path, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60).json()

    def jobs(self) -> dict[str, str]:
        """Status by name."""
        found = self.ask("GET", "/api/jobs/")
        return {job["submission_id"]: job["status"] for job in found if job["type"] == "SUBMISSION"}

    def log(self, job: Job) -> str:
        return str(self.ask("GET", f"/api/jobs/{job.name}/logs").get("logs", ""))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head`, on ports of its own, ended with all that it has started."""
    temporary = tempfile.mkdtemp(prefix="dpo-ray-", dir="/tmp")  # short: sockets lie in it
    ports = _free_ports(4)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    programs = Path(DPO[0]).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(programs / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    found = Head(f"http://127.0.0.1:{ports[1]}")
    try:
        _until(lambda: found.ask("GET", "/api/version")["ray_version"])
        yield found
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            if each.is_running():
                each.terminate()
        for each in psutil.wait_procs(family, timeout=10)[1]:
            each.kill()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a command's events, and the token."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return tmp_path / "events.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def scored(folder: Path) -> Artifact:
    """What a training reads, made here."""
    config = tiny_config(folder)
    pairs = launch.run_stage("prepare", config, {})
    return launch.run_stage("score_reference", config, {"prepare": pairs})


def launched(folder: Path, head: Head, **overrides: Any) -> RunConfig:
    return tiny_config(folder, cluster__launcher="ray", cluster__address=head.url, **overrides)


def test_stage_on_a_cluster_makes_what_it_makes_here(head: Head, events: Path, tmp_path: Path) -> None:
    """The same address, with the stage's events, and a mistake in the data is the same error with the same words."""
    config = launched(tmp_path, head)

    there = launch.run_stage("prepare", config, {})

    assert not there.reused
    shown = Follower(events).new()
    assert [event["stage"] for event in shown] == ["prepare"] * len(shown)
    kinds = [event["kind"] for event in shown]
    assert kinds[1] == "start"
    assert "progress" in kinds
    assert kinds[-1] == "end"
    here = launch.run_stage("prepare", tiny_config(tmp_path, store=str(tmp_path / "here")), {})
    assert here.address == there.address

    (tmp_path / "empty.jsonl").write_text("not a record\n")
    broken = {"prepare__path": str(tmp_path / "empty.jsonl"), "prepare__group_key": None}
    with pytest.raises(DataError) as alone:
        launch.run_stage("prepare", tiny_config(tmp_path, **broken), {})
    with pytest.raises(DataError) as launched_one:
        launch.run_stage("prepare", launched(tmp_path, head, **broken), {})
    assert str(launched_one.value) == str(alone.value)


@pytest.mark.slow
def test_whole_flow_on_a_cluster_makes_what_it_makes_here(head: Head, events: Path, tmp_path: Path) -> None:
    """Six stages are jobs, registration is not; every address is that of a run in this process."""
    there = launch.run(launched(tmp_path, head))
    here = launch.run(tiny_config(tmp_path, store=str(tmp_path / "here")))

    stages = ("prepare", "sft", "score_reference", "sweep", "train", "evaluate")
    assert {s: there.artifacts[s].address for s in stages} == {s: here.artifacts[s].address for s in stages}
    assert {name.rpartition("-")[0] for name in head.jobs()} >= {f"dpo-{s.replace('_', '-')}" for s in stages}
    steps = [e for e in Follower(events).new() if e["stage"] == "train" and e.get("unit") == "steps"]
    assert steps[-1]["done"] == 20


@pytest.mark.slow
def test_caller_that_was_killed_finds_its_job_again(head: Head, events: Path, folder: Path, scored: Artifact) -> None:
    """SIGKILL of a process that waits: the job works on, and the same call follows it to the end."""
    config = launched(folder, head, seed=3)
    job = job_for("train", config, {"score_reference": scored.address})
    waiting = _call_in_a_process(config, scored)
    _until(lambda: '"unit": "steps"' in head.log(job))

    waiting.kill()
    waiting.wait()
    assert head.jobs()[job.name] == "RUNNING"
    policy = launch.run_stage("train", config, {"score_reference": scored})

    assert policy.record.stage == "train"
    assert head.log(job).count("Running entrypoint") == 1
    assert [e["kind"] for e in Follower(events).new()].count("end") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_command_stops_its_job(head: Head, folder: Path, scored: Artifact, number: signal.Signals) -> None:
    """`dpo train` on a laptop: the job ends, leaves no result, and its workers leave the cluster."""
    config = launched(folder, head, seed=4 + number)
    file = write_config(config, folder / f"{number}.yaml")
    command = start("train", str(file), f"--scored={scored.path}", RAY_AUTH_TOKEN=TOKEN)
    _until(lambda: any(name.startswith("dpo-train") and s == "RUNNING" for name, s in head.jobs().items()))
    name = next(name for name, status in head.jobs().items() if status == "RUNNING")
    _until(lambda: "dpo-event" in str(head.ask("GET", f"/api/jobs/{name}/logs")["logs"]))

    command.send_signal(number)
    output, _ = command.communicate(timeout=120)

    assert command.returncode == 130, output
    assert "was stopped" in output
    assert head.jobs()[name] == "STOPPED"
    assert not (Path(config.store) / "jobs" / name / "result.json").exists()
    _until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])])


@pytest.mark.slow
def test_job_that_is_stopped_on_the_cluster_is_no_success(
    head: Head, events: Path, folder: Path, scored: Artifact
) -> None:
    """As by `ray job stop`. The next call starts it again, and does not tell the lines of the first."""
    config = launched(folder, head, seed=5)
    job = job_for("train", config, {"score_reference": scored.address})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(launch.run_stage, "train", config, {"score_reference": scored})
        _until(lambda: "dpo-event" in head.log(job))
        head.ask("POST", f"/api/jobs/{job.name}/stop")

        with pytest.raises(RunError, match=r"ended without a result.*STOPPED"):
            waiting.result(timeout=120)

    events.unlink()
    assert launch.run_stage("train", config, {"score_reference": scored}).record.stage == "train"
    assert [event["kind"] for event in Follower(events).new()].count("start") == 1
    assert head.jobs()[f"{job.name}-2"] == "SUCCEEDED"


def test_token_of_another_cluster_is_refused(
    head: Head, events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is none; both are the user's mistake, and the token is not shown."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token")
    with pytest.raises(UserError, match="refuses the token") as caught:
        launch.run_stage("prepare", launched(tmp_path, head), {})
    assert "another-token" not in str(caught.value)


def _call_in_a_process(config: RunConfig, scored: Artifact) -> subprocess.Popen[bytes]:
    program = (
        "import json, sys; from dpo_train import launch; from dpo_train.artifacts import open_artifact;"
        "config = launch.parse_config(sys.argv[1], origin='the test');"
        "launch.run_stage('train', config, {'score_reference': open_artifact(sys.argv[2])})"
    )
    text = json.dumps(dataclasses.asdict(config))
    return subprocess.Popen([sys.executable, "-c", program, text, str(scored.path)], stdout=subprocess.DEVNULL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _until(is_so: Callable[[], Any], timeout: float = 180) -> None:
    """Waits for something that another machine would show in the same way; there is no event of it here."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if is_so():
                return
        except (httpx2.RequestError, ValueError, KeyError):
            pass
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
