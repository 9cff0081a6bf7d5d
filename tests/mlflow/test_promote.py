"""Promotion and rollback against a real server, by one process and by several at once."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from dpo_train.errors import UserError
from dpo_train.registry import CHAMPION, LockedError, MovedError, Promotion, champion_before, lock, promote, rollback
from dpo_train.registry.promote import HISTORY_TAG
from dpo_train.tracking import _client
from tests.s3.proxy import Proxy

SPAWN = multiprocessing.get_context("spawn")
ROUNDS = 20
WAIT_SECONDS = 120
"""For another process, on a loaded machine."""


def model(client: Any, name: str, versions: int, *, passed: bool = True) -> str:
    """A registered model with versions that hold nothing."""
    client.create_registered_model(name)
    tags = {"dpo.passed": "true"} if passed else {}
    run = client.create_run("0").info
    for _ in range(versions):
        client.create_model_version(name, run.artifact_uri, run.run_id, tags=tags)
    return name


def champion_of(client: Any, name: str) -> str | None:
    found = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if found is None else str(found)


def test_champion_goes_forward_and_back(client: Any) -> None:
    """1, 2, 3, then 1 again; back over 3 and 2 to 1, and no further. The lock is gone after each."""
    name = model(client, "forward", 3)
    moved = [promote(client, name, which) for which in ("1", "2", "3", "1")]
    assert [(m.version, m.previous) for m in moved] == [("1", None), ("2", "1"), ("3", "2"), ("1", "3")]

    back = [rollback(client, name) for _ in range(3)]

    assert [m.version for m in back] == ["3", "2", "1"]
    assert champion_of(client, name) == "1"
    with pytest.raises(UserError, match=r"no champion of forward to go back to.*version 1, with none before it"):
        rollback(client, name)
    assert client.search_registered_models("name LIKE 'forward.%'") == []


@pytest.mark.parametrize("expected", [None, "1", "3"])
def test_promotion_instead_of_another_than_the_champion_is_refused(client: Any, expected: str | None) -> None:
    """What a version was compared with must be the champion still; the question is asked under the lock."""
    name = model(client, f"expected-{expected}", 3)
    promote(client, name, "1", instead_of=None)
    promote(client, name, "2", instead_of="1")

    with pytest.raises(MovedError, match=r"changed meanwhile.*version 2"):
        promote(client, name, "3", instead_of=expected)

    assert champion_of(client, name) == "2"
    assert promote(client, name, "3", instead_of="2").previous == "2"


def test_promoting_the_champion_changes_nothing(client: Any) -> None:
    """Rollback afterwards still leads to the one before."""
    name = model(client, "twice", 2)
    promote(client, name, "1")
    promote(client, name, "2")
    assert promote(client, name, "2") == Promotion(name=name, version="2", previous="2")
    assert rollback(client, name).version == "1"


def test_challenger_is_an_alias_like_any(client: Any) -> None:
    """A version is named by number or alias; what does not exist is told with what does."""
    name = model(client, "by-alias", 2)
    client.set_registered_model_alias(name, "challenger", "2")
    assert promote(client, name, "challenger").version == "2"
    with pytest.raises(UserError, match=r"no version '7'.*versions: 1, 2; aliases: challenger \(2\), champion \(2\)"):
        promote(client, name, "7")
    with pytest.raises(UserError, match="no registered model 'by-nothing'"):
        promote(client, "by-nothing", "1")


def test_version_that_did_not_pass_stays_what_it_is(client: Any) -> None:
    """Only the registration of a passing report writes the tag."""
    name = model(client, "unproven", 1, passed=False)
    with pytest.raises(UserError, match="version 1 is not known to have passed its gate"):
        promote(client, name, "1")
    assert champion_of(client, name) is None


def test_rollback_passes_over_what_was_deleted(client: Any) -> None:
    """1, 2, 3 with 2 deleted: back to 1."""
    name = model(client, "deleted", 3)
    for which in ("1", "2", "3"):
        promote(client, name, which)
    client.delete_model_version(name, "2")
    assert rollback(client, name).version == "1"


def test_rollback_passes_over_the_champion_itself(client: Any) -> None:
    """1, 2, 3, and 2 again with 3 deleted: what stands before it is 1, also for a comparison."""
    name = model(client, "itself", 3)
    for which in ("1", "2", "3", "2"):
        promote(client, name, which)
    client.delete_model_version(name, "3")
    before = champion_before(client, name)
    assert before is not None
    assert before.version == "1"
    assert rollback(client, name) == Promotion(name=name, version="1", previous="2")


def test_rollback_passes_over_what_never_passed(client: Any) -> None:
    """Champion by hand, version 2 has no passing report behind it."""
    name = model(client, "by-hand", 3)
    client.delete_model_version_tag(name, "2", "dpo.passed")
    promote(client, name, "1")
    client.set_registered_model_alias(name, CHAMPION, "2")
    client.set_registered_model_tag(name, HISTORY_TAG, '["1"]')
    assert promote(client, name, "3").previous == "2"
    assert rollback(client, name).version == "1"


@pytest.mark.parametrize("cut", ["promote", "rollback"])
def test_move_cut_short_between_its_two_writes_loses_nothing(client: Any, cut: str) -> None:
    """Promote writes the history first, rollback the alias: what is left in the history is the champion itself."""
    name = model(client, f"cut-{cut}", 3)
    promote(client, name, "1")
    promote(client, name, "2")
    if cut == "promote":  # of 3, before the alias
        client.set_registered_model_tag(name, HISTORY_TAG, '["1", "2"]')
        assert rollback(client, name).version == "1"
    else:  # to 1, before the history
        client.set_registered_model_alias(name, CHAMPION, "1")
        assert promote(client, name, "3").previous == "1"
        assert rollback(client, name).version == "1"
        with pytest.raises(UserError, match="no champion"):
            rollback(client, name)


def test_late_taker_cannot_move_the_lock_that_another_took_over(client: Any) -> None:
    """It saw the expired lock, paused, and renames at last: the name to rename to is taken since, so it fails."""
    name = model(client, "late", 1)
    client.create_registered_model(lock.lock_name(name), _tags("old", expires=time.time() - 1))

    with lock.locked(client, name):
        mine = client.get_registered_model(lock.lock_name(name)).tags
        with pytest.raises(MlflowException, match="exists"):
            client.rename_registered_model(lock.lock_name(name), f"{lock.lock_name(name)}.expired-old")
        assert client.get_registered_model(lock.lock_name(name)).tags == mine
        with pytest.raises(LockedError, match=r"are being changed by \S+@\S+ \(process \d+\) since 20.* UTC"):
            promote(client, name, "1")
    assert [found.name for found in client.search_registered_models("name LIKE 'late.lock%'")] == [
        "late.lock.expired-old"
    ]


def test_lock_that_expired_long_ago_is_cleared_away(client: Any) -> None:
    """An hour later no late taker is to be feared."""
    name = model(client, "cleared", 1)
    client.create_registered_model(lock.lock_name(name), _tags("old", expires=time.time() - 3601))
    promote(client, name, "1")
    assert client.search_registered_models("name LIKE 'cleared.lock%'") == []


def test_promotion_stands_where_old_locks_cannot_be_cleared_away(
    client: Any, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another user's lock the server says 403: a warning, and an error under the lock is still the one raised."""
    name = model(client, "not-ours", 1)
    client.create_registered_model(lock.lock_name(name), _tags("old", expires=time.time() - 3601))
    ours, delete = _client(proxy.endpoint), r"registered-models/delete$"
    proxy.fault("DELETE", delete, "denied", times=1, skip=1)  # after that of our own lock
    assert promote(ours, name, "1").version == "1"
    assert re.search(r"A lock of not-ours is left in MLflow and expires by itself: .*403.*Access Denied", caplog.text)
    caplog.clear()
    proxy.fault("DELETE", delete, "denied", times=1, skip=1)
    with pytest.raises(ZeroDivisionError), lock.locked(ours, name):
        1 / 0  # noqa: B018
    assert "A lock of not-ours is left in MLflow" in caplog.text
    assert (proxy.count("DELETE", delete, ""), proxy.count("DELETE", delete, "denied")) == (2, 2)
    assert [found.name for found in client.search_registered_models("name LIKE 'not-ours.lock%'")] == [
        "not-ours.lock.expired-old"
    ]


def test_nothing_is_written_in_the_last_minute_of_a_lease(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 90 s the first 30 are for writing: a request with its repetition takes 30, and clocks differ by 20."""
    now = time.time()
    monkeypatch.setattr(lock.time, "time", lambda: now)
    with lock.locked(client, model(client, "margin", 1)) as check:
        now += 29
        check()
        now += 2
        with pytest.raises(LockedError, match="took longer than the 90 s"):
            check()


def test_holder_whose_lease_ran_out_writes_no_more(client: Any) -> None:
    """And leaves the lock, which may be another's by now, alone."""
    name = model(client, "overdue", 1)
    with (
        pytest.raises(LockedError, match="took longer than the 1e-06 s"),
        lock.locked(client, name, lease_seconds=1e-6) as check,
    ):
        check()
    assert client.get_registered_model(lock.lock_name(name)).name == "overdue.lock"


def test_model_of_the_locks_name_is_left_alone(client: Any) -> None:
    """Somebody's own model is neither renamed nor deleted."""
    name = model(client, "unlucky", 1)
    client.create_registered_model("unlucky.lock")
    with pytest.raises(UserError, match=r"unlucky\.lock that is no lock of ours"):
        promote(client, name, "1")


def _tags(token: str, *, expires: float) -> dict[str, str]:
    return {
        "dpo.lock.holder": "somebody", "dpo.lock.token": token, "dpo.lock.since": str(expires - 90),
        "dpo.lock.expires": str(expires),
    }  # fmt: skip


def received(pipe: Connection) -> Any:
    assert pipe.poll(WAIT_SECONDS), "the other process says nothing"
    return pipe.recv()


def _promoter(url: str, name: str, version: str, barrier: Any, told: Connection) -> None:
    """Promotes its version in every round, at the same moment as the other; says what came of it."""
    client = _client(url)
    for _ in range(ROUNDS):
        barrier.wait(WAIT_SECONDS)
        try:
            moved = promote(client, name, version)
            told.send((moved.version, moved.previous))
        except LockedError as error:
            told.send(str(error))
        barrier.wait(WAIT_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("abandoned", [False, True])
def test_two_processes_promote_at_once(client: Any, server: str, abandoned: bool) -> None:
    """Each round one wins, or one comes after the other; the champion is then the last one's. With ``abandoned`` both
    first find a lock whose holder is gone."""
    name = model(client, f"both-{abandoned}", 3)
    barrier = SPAWN.Barrier(3)
    pipes = [SPAWN.Pipe() for _ in range(2)]
    processes = [
        SPAWN.Process(target=_promoter, args=(server, name, str(version), barrier, pipe[1]), daemon=True)
        for version, pipe in zip((1, 2), pipes, strict=True)
    ]
    for process in processes:
        process.start()
    wins = []
    for number in range(ROUNDS):
        promote(client, name, "3")
        if abandoned:
            client.create_registered_model(lock.lock_name(name), _tags(f"round{number}", expires=time.time() - 1))
        barrier.wait(WAIT_SECONDS)
        outcomes = [received(pipe[0]) for pipe in pipes]
        barrier.wait(WAIT_SECONDS)
        won = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        first = [outcome for outcome in won if outcome[1] == "3"]
        assert len(first) == 1, outcomes
        last = first[0] if len(won) == 1 else next(outcome for outcome in won if outcome[1] == first[0][0])
        assert champion_of(client, name) == last[0]
        assert all("are being changed by" in outcome for outcome in outcomes if isinstance(outcome, str))
        wins.append(len(won))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    print(f"abandoned={abandoned}: one of two won in {wins.count(1)} of {ROUNDS} rounds, the others came in turn")


def _holder(url: str, name: str, told: Connection) -> None:
    with lock.locked(_client(url), name, lease_seconds=5):
        told.send("held")
        signal.pause()


@pytest.mark.slow
def test_killed_holders_lock_expires(client: Any, server: str) -> None:
    """Killed with SIGKILL it cannot release: others are told for how long, and then take it over."""
    name = model(client, "killed", 1)
    pipe = SPAWN.Pipe()
    process = SPAWN.Process(target=_holder, args=(server, name, pipe[1]), daemon=True)
    process.start()
    assert received(pipe[0]) == "held"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    with pytest.raises(LockedError, match=r"its lock expires in [0-5] s"):
        promote(client, name, "1")
    with lock.locked(client, name, wait_seconds=30):
        pass
    assert promote(client, name, "1").version == "1"
