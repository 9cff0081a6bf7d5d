"""Jobs on a Ray cluster by its REST interface, played by a fake of it that fails where the real one rarely does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.cluster import job as jobs
from dpo_train.cluster.job import Ended
from dpo_train.errors import RunError, UserError
from tests.unit.cluster.fake_ray import Answer, Call, FakeRay, Played, call


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
