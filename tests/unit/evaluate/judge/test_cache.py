"""The cache of replies, shared by processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from dpo_train.evaluate.judge.cache import ReplyCache


def _put_and_get(folder: Path, name: str) -> None:
    cache = ReplyCache(folder)
    for number in range(100):
        cache.put({"number": number % 5}, name * 2000)
        found = cache.get({"number": number % 5})
        assert found in {"a" * 2000, "b" * 2000}


def test_two_processes_never_see_half_a_reply(tmp_path: Path) -> None:
    """Both write and read the same five entries all the time."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_put_and_get, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 5


def test_unknown_request_has_no_reply(tmp_path: Path) -> None:
    """Any other model, message or setting is another request; the order of its keys is nothing."""
    cache = ReplyCache(tmp_path)
    cache.put({"model": "m", "messages": [{"content": "\ud800 lone surrogate"}]}, "reply")
    assert cache.get({"messages": [{"content": "\ud800 lone surrogate"}], "model": "m"}) == "reply"
    assert cache.get({"messages": [{"content": "other"}], "model": "m"}) is None
