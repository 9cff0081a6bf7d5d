"""`dpo schedule`: made once, replaced, paused, resumed, deleted, listed; cut off, refused, done twice at once."""

from __future__ import annotations

import datetime
import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster.kubeflow import schedule_care
from dpo_train.config import load_config, parse_config
from tests.kubeflow import recurring
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server
from tests.kubeflow.state import new_id

Capture = pytest.CaptureFixture[str]

SCHEDULES = "/apis/v2beta1/recurringruns"
# Far from any time at which the tests run.
NIGHTLY = ("create", "--cron", "0 3 29 2 *", "--name", "nightly")


def only(server: Server) -> dict[str, Any]:
    """The one schedule that is there."""
    (found,) = server.state.recurring_runs.values()
    return found


def changes(server: Server, before: int = 0) -> list[str]:
    """What was asked for about schedules."""
    return [line for line in server.changes()[before:] if SCHEDULES in line]


def test_create_makes_all_that_a_schedule_needs(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Pipeline and version by reference, six fields, one run at a time, no catch-up; the next times are printed."""
    config = write_config(tmp_path, server)

    code, out, err = dpo(
        capsys, "schedule", config, "create", "--cron", "30 3 * * mon", "--name", "weekly", "train.beta=0.3"
    )

    assert (code, err) == (0, "")
    made = only(server)
    (pipeline,), (version,) = server.state.pipelines.values(), server.state.versions.values()
    assert made["trigger"] == {"cron_schedule": {"cron": "0 30 3 * * mon"}}
    assert (made["mode"], made["max_concurrency"], made["no_catchup"]) == ("ENABLE", "1", True)
    assert made["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    arguments = made["runtime_config"]["parameters"]
    assert arguments["run_name"] == "weekly"
    assert parse_config(arguments["config"]) == load_config(config, ["train.beta=0.3"])
    lines = out.splitlines()
    times = [line for line in lines if " 03:30:00 UTC" in line]
    assert len(times) == 3
    assert all(line.startswith("  Mon ") for line in times)
    assert lines[-1] == f"{server.url}/#/recurringrun/details/{made['recurring_run_id']}"


def test_zone_is_translated_and_both_clocks_are_shown(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Kubeflow gets UTC; people see their own clock and UTC."""
    config = write_config(tmp_path, server)

    code, out, _ = dpo(capsys, "schedule", config, "create", "--cron", "0 3 * * *", "--timezone", "Asia/Tokyo")

    assert code == 0
    assert only(server)["trigger"]["cron_schedule"]["cron"] == "0 0 18 * * *"
    assert only(server)["display_name"] == "mine"
    times = [line for line in out.splitlines() if "03:00:00 Asia/Tokyo" in line]
    assert len(times) == 3
    assert all("18:00:00 UTC" in line for line in times)


def test_same_again_changes_nothing(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Neither create nor update touches what has the same content already, although Kubeflow filled in its defaults."""
    config = write_config(tmp_path, server)
    ends = ("--start", "2026-01-01", "--end", "2035-01-01")
    dpo(capsys, "schedule", config, *NIGHTLY, *ends)
    before = len(server.changes())

    created = dpo(capsys, "schedule", config, *NIGHTLY, *ends)
    updated = dpo(capsys, "schedule", config, "update", "--name", "nightly")

    assert (created[0], updated[0]) == (0, 0)
    assert "is there already, with the same content" in created[1]
    assert "has this content already" in updated[1]
    assert server.changes()[before:] == []


def test_other_content_is_named_and_refused(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """What differs is said key by key, and nothing is uploaded or made."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    before = len(server.changes())

    code, out, err = dpo(
        capsys, "schedule", config, "create", "--cron", "0 4 29 2 *", "--name", "nightly", "--image",
        "registry.example.com/dpo:2", "--end", "2035-01-01", "train.beta=0.3",
    )  # fmt: skip

    assert (code, out) == (2, "")
    assert "cron: 0 0 3 29 2 * -> 0 0 4 29 2 *" in err
    assert "end: none -> 2035-01-01T00:00:00Z" in err
    assert "train.beta: 0.1 -> 0.3" in err
    assert "dpo schedule CONFIG update" in err
    assert server.changes()[before:] == []


def test_update_makes_the_new_one_before_it_deletes_the_old_one(
    server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """At no time is there none; the times stay where no others are given; a run that goes on is left alone."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY, "--end", "2035-01-01")
    old = only(server)
    run = recurring.fire(server.state, old["recurring_run_id"], "RUNNING")
    before = len(server.changes())

    code, out, _ = dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")

    assert code == 0
    assert changes(server, before) == [f"POST {SCHEDULES}", f"DELETE {SCHEDULES}/{old['recurring_run_id']}"]
    new = only(server)
    assert new["trigger"] == old["trigger"]
    assert parse_config(new["runtime_config"]["parameters"]["config"]).train.beta == 0.3
    assert run["state"] == "RUNNING"
    assert f"deleted nightly ({old['recurring_run_id']}), which it replaces" in out


def test_paused_one_stays_paused_when_it_is_updated(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Nobody is surprised by a run."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    dpo(capsys, "schedule", config, "pause", "--name", "nightly")

    assert dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")[0] == 0

    assert recurring.firing(server.state) == []
    assert len(server.state.recurring_runs) == 1


def test_update_that_cannot_delete_takes_the_new_one_back(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The old one goes on alone."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    old = only(server)
    server.fail(old["recurring_run_id"], "status", method="DELETE", status=403, times=9)

    code, _, err = dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")

    assert code == 2
    assert "does not allow this" in err
    assert only(server) is old


def test_update_that_is_cut_off_is_mended_by_the_next(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The server goes away between creation and deletion: it is said, all commands see it, and update leaves one."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    old = only(server)
    fault = server.fail(SCHEDULES, "status", method="DELETE", status=503, times=99)
    changed = ("update", "--name", "nightly", "train.beta=0.3")

    code, _, err = dpo(capsys, "schedule", config, *changed)

    assert code == 1
    assert "Several schedules 'nightly' are there now" in err
    assert len(recurring.firing(server.state)) == 2
    code, _, err = dpo(capsys, "schedule", config, *NIGHTLY, "train.beta=0.3")
    assert (code, "Kubeflow has 2 schedules 'nightly'" in err) == (2, True)
    assert dpo(capsys, "schedule", config, "resume", "--name", "nightly")[0] == 2
    assert "2 schedules are called nightly" in dpo(capsys, "schedule", config, "list")[2]
    fault.times = 0
    before = len(server.changes())
    assert dpo(capsys, "schedule", config, *changed)[0] == 0
    assert changes(server, before) == [f"DELETE {SCHEDULES}/{old['recurring_run_id']}"]
    assert parse_config(only(server)["runtime_config"]["parameters"]["config"]).train.beta == 0.3


def test_ctrl_c_waits_for_the_end_of_an_update(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Between creation and deletion it is kept, and then counts."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    server.before(SCHEDULES, lambda: signal.raise_signal(signal.SIGINT), "POST")

    code, _, _ = dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")

    assert code == 130
    assert parse_config(only(server)["runtime_config"]["parameters"]["config"]).train.beta == 0.3


def test_update_waits_while_one_of_them_is_due(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortly before and after a time it fires neither twice nor not at all: the update waits until that is over."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, "create", "--cron", "0 3 1 6 *", "--name", "nightly")
    noon = datetime.datetime(2027, 6, 1, 3, 0, 15, tzinfo=datetime.UTC)
    monkeypatch.setattr(schedule_care, "utc_now", lambda: noon)
    waited: list[float] = []
    monkeypatch.setattr(schedule_care, "pause_for", waited.append)

    _, out, _ = dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")

    assert waited == [25.0]
    assert "waiting 25 s: it is 03:00:00's turn just now" in out


def test_old_kubeflow_would_end_the_run_with_its_schedule(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Before release 2.16 neither update nor delete takes the schedule from under a run."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    run = recurring.fire(server.state, only(server)["recurring_run_id"], "RUNNING")
    server.state.release = "2.15.2"

    for action in (("update", "train.beta=0.3"), ("delete",)):
        code, _, err = dpo(capsys, "schedule", config, *action, "--name", "nightly")
        assert (code, "this Kubeflow would end it" in err, run["run_id"] in err) == (2, True, True)
    assert run["state"] == "RUNNING"
    run["state"] = "SUCCEEDED"
    assert dpo(capsys, "schedule", config, "delete", "--name", "nightly")[0] == 0


def test_pause_resume_and_delete(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Each does what it says, also a second time where that can be."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, *NIGHTLY)
    run = recurring.fire(server.state, only(server)["recurring_run_id"], "RUNNING")

    for _ in range(2):
        code, out, _ = dpo(capsys, "schedule", config, "pause", "--name", "nightly")
        assert (code, out.startswith("paused nightly")) == (0, True)
        assert recurring.firing(server.state) == []
    assert "it is paused" in dpo(capsys, "schedule", config, *NIGHTLY)[1]
    code, out, _ = dpo(capsys, "schedule", config, "resume", "--name", "nightly")
    assert (code, "missed" in out, len(recurring.firing(server.state))) == (0, False, 1)
    assert dpo(capsys, "schedule", config, "delete", "--name", "nightly")[0] == 0
    assert (server.state.recurring_runs, run["state"]) == ({}, "RUNNING")
    assert dpo(capsys, "schedule", config, "delete", "--name", "nightly")[0] == 2


def test_resume_says_that_a_missed_time_is_made_up_for(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Kubeflow starts a run for the last time that was missed, even without catch-up."""
    config = write_config(tmp_path, server)
    dpo(capsys, "schedule", config, "create", "--cron", "0 3 * * *")
    recurring.age(only(server), days=3)
    dpo(capsys, "schedule", config, "pause")

    code, out, _ = dpo(capsys, "schedule", config, "resume")

    assert code == 0
    assert "starts one run for the last that it missed" in out


def test_list(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Next time by the clock it was written for, the last run's end, what is paused; other pipelines' are left out."""
    config = write_config(tmp_path, server)
    assert "no such schedules" in dpo(capsys, "schedule", config, "list")[1]
    dpo(capsys, "schedule", config, "create", "--cron", "0 3 * * *", "--name", "a", "--timezone", "Asia/Tokyo")
    recurring.fire(server.state, only(server)["recurring_run_id"], "FAILED")
    dpo(capsys, "schedule", config, *NIGHTLY)
    dpo(capsys, "schedule", config, "pause", "--name", "nightly")
    by_hand = {**only_named(server, "a"), "recurring_run_id": new_id(), "display_name": "by hand", "description": ""}
    strange = {**by_hand, "recurring_run_id": new_id(), "pipeline_version_reference": {"pipeline_id": new_id()}}
    server.state.recurring_runs.update({item["recurring_run_id"]: item for item in (by_hand, strange)})

    code, out, err = dpo(capsys, "schedule", config, "list")

    assert (code, err) == (0, "")
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert head == ["name", "status", "next", "cron", "last run", "schedule id"]
    assert [line[:2] for line in lines] == [["a", "on"], ["by hand", "on"], ["nightly", "paused"]]
    assert lines[0][2].endswith(" 03:00")
    assert lines[0][3] == "0 3 * * * (Asia/Tokyo)"
    assert lines[0][4].startswith("failed, ")
    assert lines[1][2].endswith(" 18:00")
    assert lines[1][3] == "0 0 18 * * * (UTC)"
    assert (lines[2][2], lines[2][4]) == ("", "none yet")


def only_named(server: Server, name: str) -> dict[str, Any]:
    """The one schedule of this name."""
    (found,) = (item for item in server.state.recurring_runs.values() if item["display_name"] == name)
    return found


def test_lost_answer_makes_no_second_schedule(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It was made and the connection cut: it is found again by its mark."""
    server.fail(f"{SCHEDULES}$", "cut_after", method="POST")

    code, out, err = dpo(capsys, "schedule", write_config(tmp_path, server), *NIGHTLY)

    assert (code, err) == (0, "")
    assert only(server)["recurring_run_id"] in out


def test_request_that_did_not_arrive(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Nobody can know: exit 1, and the same command makes it."""
    config = write_config(tmp_path, server)
    server.fail(f"{SCHEDULES}$", "cut", method="POST")

    code, _, err = dpo(capsys, "schedule", config, *NIGHTLY)

    assert (code, "not known whether the schedule" in err) == (1, True)
    assert dpo(capsys, "schedule", config, *NIGHTLY)[0] == 0
    assert len(server.state.recurring_runs) == 1


@pytest.mark.parametrize("same", [True, False])
def test_two_people_at_once(same: bool, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Whose schedule is younger takes it back, and says so where the other one has other content."""
    config, state = write_config(tmp_path, server), server.state
    dpo(capsys, "schedule", config, *NIGHTLY)
    theirs = only(server)
    recurring.age(theirs, seconds=1)
    state.recurring_runs.clear()
    server.before(SCHEDULES, lambda: state.recurring_runs.update({theirs["recurring_run_id"]: theirs}), "POST")

    code, _, err = dpo(capsys, "schedule", config, *NIGHTLY, *(() if same else ("train.beta=0.3",)))

    assert only(server) is theirs
    assert code == (0 if same else 2)
    assert same or "train.beta: 0.1 -> 0.3" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create"], "needs a cron line"),
        (["create", "--cron", "0 3 30 2 *"], "never fires"),
        (["create", "--cron", "0 25 * * *"], "The hour of the cron line"),
        (["create", "--cron", "0 3 * * *", "--timezone", "Europe/Atlantis"], "no time zone that is known"),
        (["create", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin"], "cannot say '0 3 * * *' in Europe/Berlin"),
        (["create", "--cron", "0 3 * * *", "--start", "2035-02-01", "--end", "2035-01-01"], "end comes before"),
        (["create", "--cron", "0 3 * * *", "--end", "2020-01-01"], "end is over"),
        (["create", "--cron", "0 3 * * *", "--name", " "], "name is empty"),
        (["create", "--cron", "0 3 * * *", "--argument", "speed=9"], "has no argument speed"),
        (["create", "--cron", "0 3 * * *", "store=/tmp/here"], "cannot see places on this machine"),
        (["create", "--cron", "0 3 * * *", "train.bta=1"], "train.bta"),
        (["pause", "--cron", "0 3 * * *"], "--cron has no effect here: pause only takes --name"),
        (["update", "--timezone", "UTC"], "--timezone has no effect here: an update keeps the times"),
        (["update"], "has no schedule 'mine' of the pipeline 'dpo'"),
        (["pause"], "has no schedule 'mine'"),
        (["resume"], "has no schedule 'mine'"),
        (["delete"], "has no schedule 'mine'"),
    ],
)
def test_mistakes_change_nothing(
    arguments: list[str], said: str, server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """Exit code 2, one line, and nothing on the server."""
    code, out, err = dpo(capsys, "schedule", write_config(tmp_path, server), *arguments)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert server.changes() == []


def test_expired_login(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what to set."""
    server.state.token = "fresh"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale")

    code, _, err = dpo(capsys, "schedule", write_config(tmp_path, server), "list")

    assert code == 2
    assert "does not know who asks" in err


def test_several_users(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """All is made and found in the user's namespace."""
    server.state.multi_user, server.state.namespaces = True, {"team-a"}
    config = write_config(tmp_path, server, kubeflow={"namespace": "team-a"})

    assert dpo(capsys, "schedule", config, *NIGHTLY)[0] == 0
    assert dpo(capsys, "schedule", config, "update", "--name", "nightly", "train.beta=0.3")[0] == 0

    assert only(server)["namespace"] == "team-a"
