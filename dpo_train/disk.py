"""Folders on a disk: digests, whole writes, locks that die with their process, and what the system refuses."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_train.errors import DiskFullError, StoreError


def digest_path(path: Path) -> str:
    """SHA-256 over a file, or over the names and contents of all visible files below a folder."""
    if not path.exists():
        raise StoreError(f"There is nothing at {path}")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not is_hidden(p, path))
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file or a folder on the way to it has a name that begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def empty(folder: Path, *, last: str) -> None:
    """Removes the content, the file of this name last: killed halfway, the folder is still known as ours."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Writes text to a temporary neighbour, flushes it to disk and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One producer per output. The lock dies with its process, so a crash leaves nothing to clear up."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(target).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def lock_path(target: Path) -> Path:
    """The lock file of an output, beside it so that emptying the output does not release it."""
    return target.with_name(f".{target.name}.lock")


def is_locked(target: Path) -> bool:
    """Whether some process is making this output right now."""
    path = lock_path(target)
    if not path.exists():
        return False
    with path.open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns the operating system's refusals into errors that say what to do."""
    try:
        yield
    except (StoreError, DiskFullError):
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(
                f"The disk holding {target} is full; the output stays incomplete and does not count",
                fix="free some space (`dpo gc` lists outputs that nothing refers to) and run the same command again",
            ) from error
        if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
            raise StoreError(
                f"{target} cannot be written: {error.strerror}", fix="set `store` to a folder of yours"
            ) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """torch.save raises a RuntimeError in whose context the OSError stands, safetensors an error of its own."""
    signs = (os.strerror(errno.ENOSPC), "database or disk is full")  # the second is SQLite's
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False
