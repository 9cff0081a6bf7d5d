"""The file that holds what MLflow has not got yet."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_train.errors import StoreError
from dpo_train.tracking.journal import FOLDER, Journal, left_behind


def told(journal: Journal) -> list[Any]:
    return [operation.get("n") for operation, _ in journal.waiting(10_000)]


def test_what_was_sent_is_cut_off_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    """Two of three are sent: the third waits, then a fourth; once all are sent only the header is left."""
    journal = Journal.create(tmp_path, {"run_id": "r"})
    empty = journal.path.stat().st_size
    for n in range(3):
        journal.append({"op": "tags", "n": n})
    journal.sent(journal.waiting(2)[-1][1])
    assert told(journal) == [2]
    journal.append({"op": "tags", "n": 3})
    assert told(journal) == [2, 3]
    journal.sent(journal.waiting()[-1][1])
    assert told(journal) == []
    assert journal.path.stat().st_size == empty


def test_what_was_added_while_it_was_sent_waits(tmp_path: Path) -> None:
    """The sender holds no lock during its request."""
    journal = Journal.create(tmp_path, {})
    journal.append({"op": "tags", "n": 0})
    batch = journal.waiting()
    journal.append({"op": "tags", "n": 1})
    journal.sent(batch[-1][1])
    assert told(journal) == [1]


def test_mark_of_a_file_made_anew_since_drops_nothing(tmp_path: Path) -> None:
    """The header grew meanwhile, so that the old position means something else."""
    journal = Journal.create(tmp_path, {})
    journal.append({"op": "tags", "n": 0})
    mark = journal.waiting()[-1][1]
    journal.update(run_id="a-long-id")
    journal.sent(mark)
    assert told(journal) == [0]


def test_full_journal_drops_every_other_line_of_points_and_counts_them(tmp_path: Path) -> None:
    """Ten lines of two points fit, the eleventh does not: 2, 4, ... 10 go, which are ten points; all else stays."""
    line = {"op": "points", "n": 10, "points": [["loss", 0.5, 1, 1]] * 2}
    size = len(repr(line))
    journal = Journal(tmp_path / "x.jsonl", {}, most_bytes=11 * size)
    journal.append({"op": "tags", "n": "tags"})
    for n in range(10, 21):
        journal.append({**line, "n": n})
    assert told(journal) == ["tags", 10, 12, 14, 16, 18, 20]
    assert journal.dropped == 10


def _die_with_a_journal(folder: Path) -> None:
    journal = Journal.create(folder, {"run_id": "r"})
    journal.append({"op": "tags", "n": 1})
    with journal.path.open("ab") as stream:
        stream.write(b'{"op": "poi')  # a write cut short
    os.kill(os.getpid(), signal.SIGKILL)


def test_journal_of_a_killed_process_is_found_and_one_in_use_is_not(tmp_path: Path) -> None:
    """Its lock died with it; the line that was cut short is left out, and new ones go where it stood."""
    process = multiprocessing.get_context("spawn").Process(target=_die_with_a_journal, args=(tmp_path,))
    process.start()
    process.join()
    mine = Journal.create(tmp_path, {})

    [(path, changed)] = left_behind(tmp_path)
    assert path != mine.path
    assert changed == path.stat().st_mtime_ns // 10**6
    found = Journal(path, {})
    found.append({"op": "tags", "n": 2})
    assert found.header == {"run_id": "r"}
    assert told(found) == [1, 2]
    assert left_behind(tmp_path) == []
    found.close(remove=True)
    mine.close()
    assert [each.name for each in (tmp_path / FOLDER).glob("*.jsonl")] == [mine.path.name]


def test_lines_that_a_power_cut_has_damaged_are_left_out(tmp_path: Path) -> None:
    """Zeros where a block was never written, in the middle or at the end: the rest is sent as ever."""
    journal = Journal.create(tmp_path, {"run_id": "r"})
    for n in range(3):
        journal.append({"op": "tags", "n": n})
    journal.close()
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    journal.path.write_bytes(b"".join(lines) + b"\0" * 512)

    assert told(Journal(journal.path, {})) == [0, 2]


def test_journal_with_a_damaged_header_says_what_to_do(tmp_path: Path) -> None:
    """And its lock is let go, so that it can be tried again."""
    path = tmp_path / FOLDER / "x.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\0" * 512)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"x\.jsonl is damaged.*remove it"):
            Journal(path, {})


def test_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    """As with any output."""
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(OSError, match=FOLDER):
        Journal.create(tmp_path, {})
