"""Jobs on a Ray cluster by its REST interface, played by a fake of it that fails where the real one rarely does."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_train.cluster import job as jobs
from dpo_train.cluster import ray_rest
from dpo_train.cluster.job import Ended, Job
from dpo_train.cluster.ray_api import RayApiLauncher
from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ConfigError, DpoError, RunError, UserError
from tests.unit.cluster.fake_ray import Answer, FakeRay, Played, fake_ray

TOKEN = "a-token-that-nobody-may-see"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    for name in (ray_rest.TOKEN, ray_rest.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_rest, "DEFAULT_TOKEN_PATH", Path("/nowhere/auth_token"))
    with fake_ray() as server:
        yield server


@dataclass
class Call:
    """One caller, whose time passes by waiting alone."""

    config: RunConfig
    job: Job
    told: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    waited_s: float = 0.0
    interrupt_after: int | None = None

    def wait(self, seconds: float) -> None:
        self.waited_s += seconds
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                self.interrupt_after = None
                raise KeyboardInterrupt

    def run(self) -> Ended:
        launcher = RayApiLauncher(self.config, wait=self.wait, clock=lambda: self.waited_s)
        return launcher.run(self.job, tell=self.told.append, line=self.lines.append)


def call(folder: Path, ray: FakeRay, *overrides: str, run_id: str | None = "a-run") -> Call:
    tree = {
        "store": str(folder / "store"),
        "model": {"path": str(folder)},
        "prepare": {"path": str(folder)},
        "cluster": {"launcher": "ray", "address": ray.url},
    }
    config = parse_config(json.dumps(tree), overrides, origin="the test")
    return Call(config, jobs.job_for("prepare", config, {}, run_id=run_id))


def existing(
    one: Call, ray: FakeRay, status: str, *turns: tuple[str, str], log: str = "", result: str | None = None
) -> Played:
    """The same job as another caller has started it before."""
    Call(one.config, one.job).run()
    played = Played(turns=list(turns), spec=ray.jobs[one.job.name].spec, status=status, log=log)
    ray.jobs[one.job.name] = played
    ray.requests.clear()
    if result is not None:
        jobs.write_result(one.job, result)
    return played


def test_job_is_submitted_with_its_file_and_followed_to_its_end(ray: FakeRay, tmp_path: Path) -> None:
    """Every line comes once, the last one also without its end; the store has the job's file before Ray has the job."""
    ray.turns = [("PENDING", ""), ("RUNNING", "one\ntw"), ("RUNNING", "o\n"), ("SUCCEEDED", "three\n\nlast")]
    one = call(tmp_path, ray)

    ended = one.run()

    assert ended == Ended(succeeded=True, reason="SUCCEEDED")
    assert one.lines == ["one", "two", "three", "", "last"]
    assert jobs.read_job(one.job.folder).stage == "prepare"
    assert one.told == [f"submitted to {ray.url}"]


def test_submitted_description_holds_the_command_and_no_config(ray: FakeRay, tmp_path: Path) -> None:
    """What the dashboard shows to everybody: the job's folder, and plain settings."""
    one = call(tmp_path, ray, "storage.endpoint=http://s3:9000", "cluster.environment={NCCL_SOCKET_IFNAME: eth0}")

    one.run()

    spec = ray.jobs[one.job.name].spec
    assert spec["submission_id"] == one.job.name
    assert spec["entrypoint"] == f"dpo job {one.job.folder}"
    assert spec["entrypoint_num_cpus"] == 0.1
    assert spec["runtime_env"] == {
        "env_vars": {
            "AWS_ENDPOINT_URL": "http://s3:9000",
            "NCCL_SOCKET_IFNAME": "eth0",
            "RAY_JOB_STOP_WAIT_TIME_S": "20",
        }
    }
    assert set(spec["metadata"]) == {"dpo-stage", "dpo-spec"}


def test_live_job_of_the_same_name_is_adopted(ray: FakeRay, tmp_path: Path) -> None:
    """Whoever comes second follows it from its first line on."""
    one = call(tmp_path, ray)
    existing(one, ray, "RUNNING", ("RUNNING", ""), ("RUNNING", "late\n"), ("SUCCEEDED", ""), log="early\n")

    assert one.run().succeeded
    assert one.lines == ["early", "late"]
    assert ray.count("POST") == 0


def test_live_job_of_another_content_is_an_error(ray: FakeRay, tmp_path: Path) -> None:
    """It is neither followed nor ended."""
    one = call(tmp_path, ray)
    existing(one, ray, "RUNNING").spec["metadata"]["dpo-spec"] = "another"

    with pytest.raises(UserError, match="Another job runs on the cluster under the name"):
        one.run()
    assert ray.count("POST") == 0


def test_result_of_the_same_run_stands(ray: FakeRay, tmp_path: Path) -> None:
    """Asked again within a run, a job that has succeeded is not run again."""
    one = call(tmp_path, ray)
    existing(one, ray, "SUCCEEDED", result="prepare/0123456789abcdef")

    assert one.run().succeeded
    assert ray.count("POST") == 0


@pytest.mark.parametrize(
    ("status", "result", "run_id"),
    [
        ("FAILED", None, "a-run"),
        ("STOPPED", "prepare/0123456789abcdef", "a-run"),
        ("SUCCEEDED", None, "a-run"),
        ("SUCCEEDED", "prepare/0123456789abcdef", None),
    ],
    ids=["failed", "stopped", "without a result", "outside of a run, whose data may have changed"],
)
def test_ended_job_is_replaced(
    ray: FakeRay, tmp_path: Path, status: str, result: str | None, run_id: str | None
) -> None:
    """Under a name of its own, because Ray may not have let go of the first; the old result is dropped."""
    one = call(tmp_path, ray, run_id=run_id)
    existing(one, ray, status, log="old\n", result=result)

    assert one.run().succeeded
    assert one.lines == ["hello", "bye"]
    assert list(ray.jobs) == [one.job.name, f"{one.job.name}-2"]
    assert jobs.read_result(one.job) is None


def test_latest_attempt_is_the_one_that_counts(ray: FakeRay, tmp_path: Path) -> None:
    """After two that have failed, the third is followed by whoever comes."""
    one = call(tmp_path, ray)
    failed = existing(one, ray, "FAILED")
    ray.jobs[f"{one.job.name}-2"] = failed
    ray.jobs[f"{one.job.name}-3"] = Played(
        turns=[("RUNNING", ""), ("RUNNING", ""), ("SUCCEEDED", "")], spec=failed.spec, log="third\n"
    )

    assert one.run().succeeded
    assert one.lines == ["third"]
    assert ray.count("POST") == 0


def test_submission_whose_answer_is_lost_makes_one_job(ray: FakeRay, tmp_path: Path) -> None:
    """The second attempt meets the job of the first."""
    ray.fault = lambda method, path, n: Answer(is_cut=True) if method == "POST" and n == 0 else None
    one = call(tmp_path, ray)

    assert one.run().succeeded
    assert ray.count("POST /api/jobs/") == 2
    assert one.lines == ["hello", "bye"]


@pytest.mark.parametrize("fault", [Answer(500), Answer(503), Answer(429), Answer(is_cut=True), Answer(404, "no host")])
def test_faults_on_the_way_cost_no_line(ray: FakeRay, tmp_path: Path, fault: Answer) -> None:
    """Two of three answers are faults; each line still comes once and in order."""
    ray.turns = [("RUNNING", f"line {n}\n") for n in range(9)] + [("SUCCEEDED", "")]
    numbers = iter(range(10_000))
    ray.fault = lambda method, path, n: fault if "/api/jobs/" in path and next(numbers) % 3 else None
    one = call(tmp_path, ray)

    assert one.run().succeeded
    assert one.lines == [f"line {n}" for n in range(9)]


def test_server_that_asks_for_a_pause_gets_it(ray: FakeRay, tmp_path: Path) -> None:
    """Retry-After, in seconds."""
    slow = Answer(429, headers={"Retry-After": "90"})
    ray.fault = lambda method, path, n: slow if method == "POST" and n == 0 else None
    one = call(tmp_path, ray)

    assert one.run().succeeded
    assert one.waited_s >= 90


def test_cluster_that_stays_away_ends_the_wait_and_not_the_job(ray: FakeRay, tmp_path: Path) -> None:
    """After ten minutes; the job is not stopped, so that the next call finds it."""
    ray.turns = [("RUNNING", "")]
    ray.fault = lambda method, path, n: Answer(502) if method == "GET" and "/jobs/" in path and n > 3 else None
    one = call(tmp_path, ray)

    with pytest.raises(RunError, match=r"gave no answer for 600 s.*status 502.*finds them again"):
        one.run()
    assert 500 < one.waited_s < 700
    assert ray.count(f"POST /api/jobs/{one.job.name}/stop") == 0


def test_log_that_cannot_be_read_does_not_fail_the_job(ray: FakeRay, tmp_path: Path) -> None:
    """For example, because the machine of the job's process is gone."""
    ray.fault = lambda method, path, n: Answer(500, "UnicodeDecodeError") if path.endswith("/logs") else None
    one = call(tmp_path, ray)

    assert one.run().succeeded
    assert one.lines == []
    assert [text for text in one.told if "cannot be read" in text and "UnicodeDecodeError" in text]


@pytest.mark.parametrize(
    ("status", "more", "reason"),
    [
        ("STOPPED", {}, "STOPPED: somebody has stopped it"),
        ("FAILED", {"driver_exit_code": 2}, "exit code 2. Its last line: dpo: no such data"),
        ("FAILED", {"driver_exit_code": 127}, "the cluster has no `dpo` command"),
        ("FAILED", {"driver_exit_code": -9}, "killed, maybe for want of memory"),
        ("FAILED", {"error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"}, "had no room for it"),
        ("FAILED", {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no\nspace"}, "FAILED: no space"),
    ],
)
def test_only_succeeded_is_success(
    ray: FakeRay, tmp_path: Path, status: str, more: dict[str, object], reason: str
) -> None:
    """Every other end says in words what it was."""
    one = call(tmp_path, ray)
    printed = 'dpo: no such data\ndpo-event {"kind": "x"}\n'
    existing(one, ray, "RUNNING", ("RUNNING", ""), ("RUNNING", printed), (status, "")).more = more

    ended = one.run()

    assert not ended.succeeded
    assert reason in ended.reason


def test_job_that_waits_for_room_is_told_once(ray: FakeRay, tmp_path: Path) -> None:
    """Some seconds are normal; a queue is not stuck."""
    ray.turns = [("PENDING", "")] * 60 + [("SUCCEEDED", "")]
    one = call(tmp_path, ray)

    assert one.run().succeeded
    assert one.told.count("waits for room on the cluster") == 1


def test_job_that_the_cluster_forgot_is_an_error(ray: FakeRay, tmp_path: Path) -> None:
    """A head that was restarted without its memory."""
    one = call(tmp_path, ray)
    existing(one, ray, "RUNNING")
    one.wait = lambda seconds: ray.jobs.clear()  # type: ignore[method-assign]

    with pytest.raises(RunError, match="does not know the job"):
        one.run()


def test_interrupt_stops_the_job_and_sees_it_end(ray: FakeRay, tmp_path: Path) -> None:
    """Ctrl-C here is the end there."""
    ray.turns = [("RUNNING", "")]
    one = call(tmp_path, ray)
    one.interrupt_after = 2

    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert ray.jobs[one.job.name].status == "STOPPED"
    assert one.told[-1] == "was stopped"


def test_interrupt_without_a_way_to_the_cluster_says_what_to_do(ray: FakeRay, tmp_path: Path) -> None:
    """The job goes on, and the person is told how to end it."""
    ray.turns = [("RUNNING", "")]
    ray.fault = lambda method, path, n: Answer(503) if path.endswith("/stop") else None
    one = call(tmp_path, ray)
    one.interrupt_after = 2

    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert "could not be stopped" in one.told[-1]
    assert one.told[-1].endswith(f"ray job stop --address {ray.url} {one.job.name}")


def test_job_past_its_deadline_is_stopped(ray: FakeRay, tmp_path: Path) -> None:
    """Ray knows no deadline."""
    one = call(tmp_path, ray, "cluster.deadline_hours=2.0")
    existing(one, ray, "RUNNING").more = {"start_time": 1_000_000}

    ended = one.run()

    assert not ended.succeeded
    assert ended.reason.startswith("DeadlineExceeded")
    assert ray.count(f"POST /api/jobs/{one.job.name}/stop") == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Answer(200, "<html>nginx</html>"), "is not Ray's dashboard.*nginx"),
        (Answer(404, "not found"), "is not Ray's dashboard.*status 404"),
        (Answer(302, "", {"Location": "https://login"}), "points elsewhere.*302 to https://login"),
        (Answer(401, "Unauthorized"), "asks for a token.*set RAY_AUTH_TOKEN"),
        (Answer(502, "bad gateway"), "does not answer.*status 502.*check cluster.address"),
    ],
)
def test_address_of_something_else_is_the_users_mistake(
    ray: FakeRay, tmp_path: Path, fault: Answer, message: str
) -> None:
    """Said within seconds, and before anything is started."""
    ray.fault = lambda method, path, n: fault
    one = call(tmp_path, ray)

    with pytest.raises(UserError, match=message):
        one.run()
    assert one.waited_s <= 20
    assert ray.count("POST") == 0


def test_address_where_nobody_listens_is_the_users_mistake(ray: FakeRay, tmp_path: Path) -> None:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        ray.url = f"http://127.0.0.1:{free.getsockname()[1]}"

    with pytest.raises(UserError, match=r"does not answer.*ConnectError"):
        call(tmp_path, ray).run()


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "http://", "http://head:8265/?x=1", "http://[::1"]
)
def test_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigError, match="not the address of Ray's dashboard"):
        call(tmp_path, FakeRay(url=address)).run()


def test_login_in_the_address_is_refused_without_showing_it(tmp_path: Path) -> None:
    """It would lie in the store, in the job's config."""
    with pytest.raises(ConfigError, match="holds a login") as caught:
        call(tmp_path, FakeRay(url="http://me:hunter2@head:8265")).run()
    assert "hunter2" not in str(caught.value)


def test_token_is_sent_and_never_told(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a server's error shows it."""
    monkeypatch.setenv(ray_rest.TOKEN, f" {TOKEN}\n")
    ray.fault = lambda method, path, n: Answer(500, f"bad header: {TOKEN}") if method == "POST" else None
    one = call(tmp_path, ray)

    with pytest.raises(DpoError) as caught:
        one.run()

    assert {headers.get("authorization") for headers in ray.headers} == {f"Bearer {TOKEN}"}
    assert TOKEN not in " ".join([str(caught.value), *one.told, *one.lines])


def test_refused_token_is_told_apart_from_a_missing_one(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says 403 to a token that it does not know."""
    monkeypatch.setenv(ray_rest.TOKEN, TOKEN)
    ray.fault = lambda method, path, n: Answer(403, "Forbidden")

    with pytest.raises(UserError, match=r"refuses the token.*status 403"):
        call(tmp_path, ray).run()


def test_token_comes_from_the_file_that_is_named(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's own tools find it; a file that is not there is a mistake."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv(ray_rest.TOKEN_PATH, str(tmp_path / "token"))
    call(tmp_path, ray).run()
    assert ray.headers[0]["authorization"] == f"Bearer {TOKEN}"

    monkeypatch.setenv(ray_rest.TOKEN_PATH, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH names cannot be read"):
        call(tmp_path, ray).run()


def test_token_of_this_machines_ray_stays_on_this_machine(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ray start`` leaves one in the home directory; another cluster has no use for it."""
    (tmp_path / "auth_token").write_text(TOKEN)
    monkeypatch.setattr(ray_rest, "DEFAULT_TOKEN_PATH", tmp_path / "auth_token")

    assert ray_rest.token_for(ray.url) == TOKEN
    assert ray_rest.token_for("http://head.example:8265") == ""
