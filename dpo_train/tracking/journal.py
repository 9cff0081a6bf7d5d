"""What MLflow has not been told yet: one file for each run, a JSON object a line, sent in order.

    header                                   which run it is about, or how to create it
    {"op": "points", ...}                    the rest is what a run_log.RunLog is told

What has been sent is cut off the file. A process that dies between the two sends it again: every operation can be
repeated (MLflow keeps one point for equal name, step, time and value). Its owner holds a lock, so that what is left
behind by a process that died is told from what is in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dpo_train.disk import disk_errors, is_locked, lock_path, locked, write_atomically
from dpo_train.errors import StoreError

FOLDER = "unsent"
POINTS = "points"
MOST_BYTES = 64 << 20
"""Some 80,000 steps. A fuller journal is thinned; all steps stay in the output's ``metrics.jsonl``."""

Mark = tuple[int, int]
"""Which making of the file, and a position in it."""


class Journal:
    """One run's file; its lock is held until ``close``. Threads may share it.

    Raises:
        StoreError: it cannot be written, or what is there is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, most_bytes: int = MOST_BYTES) -> None:
        self.path, self.header, self._most_bytes = path, dict(header), most_bytes
        self._guard = threading.RLock()
        self._making = self._size = self._start = self._head = 0
        with disk_errors(path), contextlib.ExitStack() as stack:
            stack.enter_context(locked(path))
            if path.is_file():
                header_line, _, rest = path.read_bytes().partition(b"\n")
                if (found := _decoded(header_line)) is None:
                    raise StoreError(f"The journal {path} is damaged", fix="remove it: nothing of it can be sent")
                self.header = found
                self._rewrite(_undamaged(rest))
            else:
                self._rewrite(b"")
            self._lock = stack.pop_all()

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """A new one below a store's folder."""
        return cls(folder / FOLDER / f"{uuid.uuid4().hex}.jsonl", header)

    def append(self, operation: Mapping[str, Any], *, durable: bool = False) -> None:
        """Adds one operation; ``durable`` outlives a power cut as well."""
        line = json.dumps(operation).encode() + b"\n"
        with self._guard, disk_errors(self.path):
            with self.path.open("ab") as stream:
                stream.write(line)
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            self._size += len(line)
            if self._size - self._start > self._most_bytes:
                self._thin()

    def waiting(self, most: int = 50) -> list[tuple[dict[str, Any], Mark]]:
        """The next operations that are unsent, each with what to give to ``sent`` once it has arrived."""
        with self._guard, self.path.open("rb") as stream:
            stream.seek(self._start)
            return [(json.loads(line), (self._making, stream.tell())) for line in _first(stream, most)]

    def sent(self, mark: Mark) -> None:
        """Everything up to the mark has arrived. A file made anew since keeps it: what is sent twice is stored once."""
        making, position = mark
        with self._guard:
            if making != self._making:
                return
            self._start = position
            if position == self._size:
                os.truncate(self.path, self._head)
                self._start = self._size = self._head

    @property
    def dropped(self) -> int:
        """Points that were dropped."""
        return int(self.header.get("dropped", 0))

    def update(self, **fields: Any) -> None:
        """Changes the header."""
        with self._guard, disk_errors(self.path):
            self.header |= fields
            self._rewrite(self._unsent())

    def close(self, *, remove: bool = False) -> None:
        """Lets go of the file; with ``remove`` it is not needed any more."""
        with self._guard:
            if remove:
                self.path.unlink(missing_ok=True)
                lock_path(self.path).unlink(missing_ok=True)
            self._lock.close()

    def _unsent(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(self._start)
            return stream.read()

    def _thin(self) -> None:
        """Drops every other line of points."""
        kept, num_points, dropped = [], 0, 0
        for line in self._unsent().splitlines(keepends=True):
            operation = json.loads(line)
            if operation["op"] == POINTS:
                num_points += 1
                if num_points % 2 == 0:
                    dropped += len(operation["points"])
                    continue
            kept.append(line)
        self.header["dropped"] = self.dropped + dropped
        self._rewrite(b"".join(kept))

    def _rewrite(self, unsent: bytes) -> None:
        head = json.dumps(self.header) + "\n"
        write_atomically(self.path, head + unsent.decode())
        self._head = self._start = len(head.encode())
        self._size = self._head + len(unsent)
        self._making += 1


def _first(stream: BinaryIO, most: int) -> Iterator[bytes]:
    """Lines of a stream, one at a time, so that ``tell`` says where each ends."""
    for _ in range(most):
        if not (line := stream.readline()):
            return
        yield line


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _undamaged(lines: bytes) -> bytes:
    """Without what a crash or a power cut has left half written: the last line, blocks of zeros."""
    return b"".join(line for line in lines.splitlines(keepends=True) if line.endswith(b"\n") and _decoded(line))


def left_behind(store: Path) -> list[tuple[Path, int]]:
    """Journals that no living process holds, the oldest first, each with its last change in ms since 1970."""
    found = []
    for path in (store / FOLDER).glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # another process has just sent it
            if not is_locked(path):
                found.append((path, path.stat().st_mtime_ns // 10**6))
    return sorted(found, key=lambda each: (each[1], each[0].name))
