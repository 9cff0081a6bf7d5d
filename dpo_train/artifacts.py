"""Stage outputs: a folder plus ``record.json``, which is written last and makes the output complete.

    <store>/<stage>/<digest>/          the digest of stage, config, input digests and code version: address = identity
        claim.json                     written first: whose folder this is, also while it is incomplete
        ...                            what the stage writes
        record.json                    written last; without it the folder does not count

``produce`` is the only way to make one. It takes a lock, reuses a complete output, and otherwise runs the stage's
body, which either starts afresh or, if it says that it can, continues from what is there. The report's types live here
too, so that the registry can read a verdict without importing the evaluation.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_train.errors import DiskFullError, StoreError

RECORD_FILE = "record.json"
CLAIM_FILE = "claim.json"

# What only shows or moves results is not part of what computes them.
_PRESENTATION = {"cli", "cluster", "progress.py", "tracking.py", "launch.py", "runs.py"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a complete output says about itself."""

    stage: str
    digest: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    code_version: str
    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A complete output on disk. ``reused`` says that this call did not have to make it."""

    path: Path
    record: Record
    reused: bool = False

    @property
    def address(self) -> str:
        """``<stage>/<digest>``: where the output lies in any store that holds it."""
        return f"{self.record.stage}/{self.record.digest}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a stage's body hands back for its record."""

    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % confidence interval and the count it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's answer: every rule with what was asked and what was found."""

    learned: bool
    passed: bool
    rules: tuple[Mapping[str, Any], ...]


@functools.cache
def code_version() -> str:
    """Package version and a digest of every source file that can change a result."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] not in _PRESENTATION:
            digest.update(f"{relative}\0".encode() + path.read_bytes() + b"\0")
    return f"{importlib.metadata.version('dpo-train')}+{digest.hexdigest()[:12]}"


def identity(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The digest that names an output: content and config only, never time or place."""
    content = {"stage": stage, "config": config, "inputs": inputs, "code": code_version()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


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


class Output:
    """The folder that a stage's body writes into."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file so that it is either whole or absent."""
        write_atomically(self.path / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def produce(
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    target: Path,
    body: Callable[[Output], Summary],
    *,
    resumable: bool = False,
) -> Artifact:
    """Makes the output at ``target``, or reuses it if it is complete.

    Args:
        stage: name of the arrow.
        config: the part of the config that can change the content.
        inputs: digest of each input, by name.
        target: the output's folder.
        body: writes the content and returns what the record should say.
        resumable: an incomplete folder of the same identity is left for the body to continue; otherwise it is emptied.

    Raises:
        StoreError: the folder cannot be written, or holds something else.
        DiskFullError: the disk filled up; the folder stays incomplete.
    """
    config = json.loads(json.dumps(config))
    digest = identity(stage, config, inputs)
    claim = {"stage": stage, "digest": digest, "config": config, "inputs": dict(inputs)}
    with _storage_errors(target):
        if found := _complete(target, claim):  # before the lock: a store may be mounted read-only
            return found
    with _storage_errors(target), _locked(target):
        if found := _complete(target, claim):
            return found
        if target.exists() and not resumable:
            _empty(target)
        target.mkdir(parents=True, exist_ok=True)
        output = Output(target)
        output.write_json(CLAIM_FILE, claim)
        start = time.perf_counter()
        summary = body(output)
        record = Record(
            stage=stage,
            digest=digest,
            config=config,
            inputs=dict(inputs),
            code_version=code_version(),
            counts=summary.counts,
            metrics=summary.metrics,
            details=summary.details,
            versions=library_versions(),
            seconds=round(time.perf_counter() - start, 3),
        )
        output.write_json(RECORD_FILE, dataclasses.asdict(record))
        return Artifact(path=target, record=record)


def open_artifact(path: Path, stage: str | None = None) -> Artifact:
    """Reads a complete output.

    Raises:
        StoreError: nothing is there, it is incomplete, or another stage made it.
    """
    file = path / RECORD_FILE
    if not file.is_file():
        state = "is not complete (its stage was interrupted)" if (path / CLAIM_FILE).is_file() else "holds no output"
        raise StoreError(f"{path} {state}", expected=f"a folder with {RECORD_FILE}", fix="run the stage that makes it")
    try:
        record = Record(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise StoreError(f"{file} was written by another version", fix=f"remove {path} and run again") from None
    if stage is not None and record.stage != stage:
        raise StoreError(f"{path} is the output of another stage", got=record.stage, expected=stage)
    return Artifact(path=path, record=record)


def check_writable(store: Path) -> None:
    """Tries to write into the store, before anything slow starts.

    Raises:
        StoreError: it cannot be.
    """
    with _storage_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass


def _empty(folder: Path) -> None:
    """Removes the content, the claim last: killed halfway, the folder is still known as ours."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == CLAIM_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in the numbers. They are recorded, not part of the identity."""
    found = {}
    for name in ("torch", "transformers", "peft", "ray", "pyarrow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, text: str) -> None:
    """Writes text to a temporary neighbour, flushes it to disk and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _complete(target: Path, claim: Mapping[str, Any]) -> Artifact | None:
    """The output if it is there already; an error if the folder is not for it."""
    _check_claim(target, claim)
    if not (target / RECORD_FILE).is_file():
        return None
    return dataclasses.replace(open_artifact(target), reused=True)


def _check_claim(target: Path, claim: Mapping[str, Any]) -> None:
    file = target / CLAIM_FILE
    if not file.is_file():
        # A process killed before its claim was in place leaves the claim's temporary file.
        leftover = f".{CLAIM_FILE}."
        if target.is_dir() and any(not p.name.startswith(leftover) for p in target.iterdir()):
            raise StoreError(f"The output folder {target} is not empty and not an output of ours", fix="name another")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise StoreError(f"{file} is damaged", fix=f"remove {target} and run again") from None
    if not isinstance(found, dict) or not {"stage", "digest"} <= found.keys():
        raise StoreError(f"{file} is damaged", fix=f"remove {target} and run again")
    if found["digest"] == claim["digest"]:
        return
    different = list(differences(found, claim))
    raise StoreError(
        f"The output folder {target} belongs to another run of `{found['stage']}`",
        got="; ".join(different[:5]) or "the same config made by another version of the code",
        expected="an empty folder or one made by this very config",
        fix="name another folder, or remove this one",
    )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two nested mappings, each as a sentence."""
    for key in sorted(set(found) | set(wanted)):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new and key != "digest":
            yield f"{prefix}{key} was {old!r}, is now {new!r}"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
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
def _storage_errors(target: Path) -> Iterator[None]:
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
