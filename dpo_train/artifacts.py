"""Stage outputs: a folder plus ``record.json``, which is written last and makes the output complete.

    <store>/<stage>/<digest>/          the digest of stage, config, input digests and code version: address = identity
        claim.json                     written first: whose folder this is, also while it is incomplete
        ...                            what the stage writes
        record.json                    written last; without it the folder does not count

``produce`` is the only way to make one. It takes a lock, reuses a complete output, and otherwise runs the stage's
body, which either starts afresh or, if it says that it can, continues from what is there.

A store may lie at s3://. Then a stage writes into a local copy of the output's folder and publishes its files, the
record last; whoever reads fetches what the record lists. Nothing relies on a bucket's listing being up to date.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.disk import disk_errors, empty, locked, write_atomically
from dpo_train.errors import StoreError
from dpo_train.identity import code_version, differences, identity, library_versions

RECORD_FILE = "record.json"
CLAIM_FILE = "claim.json"

_LOG = logging.getLogger(__name__)


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
    files: Mapping[str, int] = field(default_factory=dict)
    """Every file of the output with its size in bytes."""
    seconds: float = 0.0
    making: str = ""
    """Tells one making of the output from another of the same identity: copies of files belong to one of them."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A complete output. ``reused`` says that this call did not have to make it."""

    home: str
    """Where it lies: a folder, or s3://."""
    record: Record
    reused: bool = False

    @property
    def path(self) -> Path:
        """The output as a local folder, all files in it; from s3:// what is not here yet is fetched first."""
        if storage.is_remote(self.home):
            _renew_copy(self)
            mirror(self.home).fetch_all(self.record.files)
        return local_copy(self.home)

    def file(self, name: str) -> Path:
        """One file of the output, fetched if need be."""
        _renew_copy(self)
        return mirror(self.home).fetch(name, size=self.record.files.get(name))

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


def local_copy(home: str) -> Path:
    """The folder itself, or for s3:// the folder here that stands for it."""
    if not storage.is_remote(home):
        return Path(home)
    return storage.cache_folder() / "s3" / home.removeprefix("s3://")


def mirror(home: str) -> storage.Mirror:
    """A folder of ours together with its local copy."""
    return storage.Mirror(home, local_copy(home))


class Output:
    """The folder that a stage's body writes into: ``path`` here, ``home`` where it belongs."""

    def __init__(self, home: str, scratch: Sequence[str] = ()) -> None:
        self.home = home
        self.path = local_copy(home)
        self._scratch = set(scratch)
        self._elsewhere: dict[str, int] = {}

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file so that it is either whole or absent."""
        write_atomically(self.path / name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def adopt(self, files: Mapping[str, int]) -> None:
        """Files (name, bytes) that workers, maybe on other machines, have written and published."""
        self._elsewhere |= files

    def files(self) -> dict[str, int]:
        """All files that belong to the output, with their sizes; no claim, no scratch, no temporary ones."""
        found = dict(self._elsewhere) if storage.is_remote(self.home) else {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and not hidden and name.parts[0] not in {*self._scratch, CLAIM_FILE, RECORD_FILE}:
                found[name.as_posix()] = file.stat().st_size
        return found

    def adopt_noted(self, note: str) -> None:
        """The same, by a file in which a worker has noted them; without one there is nothing to adopt."""
        if storage.is_remote(self.home) and (text := _read(self.home, note)) is not None:
            self.adopt(json.loads(text))

    def complete(self, record: Record) -> None:
        """Publishes what no worker has published yet, then the record."""
        shared = mirror(self.home)
        shared.publish(*(name for name in record.files if name not in self._elsewhere))
        write_atomically(self.path / RECORD_FILE, _record_text(record))
        shared.publish(RECORD_FILE)


def produce(
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    target: Path | str,
    body: Callable[[Output], Summary],
    *,
    resumable: bool = False,
    scratch: Sequence[str] = (),
) -> Artifact:
    """Makes the output at ``target``, or reuses it if it is complete.

    Args:
        stage: name of the arrow.
        config: the part of the config that can change the content.
        inputs: digest of each input, by name.
        target: the output's folder, here or at s3://.
        body: writes the content and returns what the record should say.
        resumable: an incomplete folder of the same identity is left for the body to continue; otherwise it is emptied.
        scratch: names in the folder that are no part of the output, such as checkpoints.

    Raises:
        StoreError: the folder cannot be written, or holds something else.
        DiskFullError: the disk filled up; the folder stays incomplete.
        StorageUnavailableError: object storage did not do what was asked, however often.
    """
    home = str(target)
    local = local_copy(home)
    config = json.loads(json.dumps(config))
    digest = identity(stage, config, inputs)
    claim = {"stage": stage, "digest": digest, "config": config, "inputs": dict(inputs)}
    with disk_errors(local):
        # Before the lock: a store may be mounted read-only. A bucket's lock lies here, and two looks cost twice.
        if not storage.is_remote(home) and (found := _complete(home, claim)):
            return found
    with disk_errors(local), locked(local):
        if found := _complete(home, claim):
            return found
        if local.exists() and not (resumable and _read(home, CLAIM_FILE) is not None):
            empty(local, last=CLAIM_FILE)  # a copy of what is no longer at s3:// is nothing to go on from
        local.mkdir(parents=True, exist_ok=True)
        if resumable:
            _fetch_unfinished(home)
        output = Output(home, scratch)
        output.write_json(CLAIM_FILE, claim)
        mirror(home).publish(CLAIM_FILE)
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
            files=output.files(),
            seconds=round(time.perf_counter() - start, 3),
            making=uuid.uuid4().hex,
        )
        if storage.is_remote(home) and (found := _complete(home, claim)):
            return found  # another machine was quicker: its record must go on saying what its files are
        output.complete(record)
        return Artifact(home=home, record=record)


def _fetch_unfinished(home: str) -> None:
    """What an earlier attempt, maybe on another machine, has left at s3://. A listing that lags costs work again.

    Outputs inside this one, such as a sweep's trials, are fetched by those who make them.
    """
    if not storage.is_remote(home):
        return
    sizes = {entry.path.removeprefix(home).lstrip("/"): entry.size for entry in storage.list_files(home)}
    inside = tuple(name.removesuffix(CLAIM_FILE) for name in sizes if name.endswith(f"/{CLAIM_FILE}"))
    mirror(home).fetch_all({name: size for name, size in sizes.items() if not name.startswith(inside)})


def _record_text(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), indent=2, sort_keys=True) + "\n"


def _renew_copy(artifact: Artifact) -> None:
    """Drops the local copy of an output at s3:// that has been made again since.

    A file of the same name and size may hold something else; by the record beside them, copies are known to be of this
    making.
    """
    if not storage.is_remote(artifact.home):
        return
    local = local_copy(artifact.home)
    text = _record_text(artifact.record)
    if _is_copy_of(local, text):
        return
    with disk_errors(local), locked(local):
        if _is_copy_of(local, text):  # another process has just done it
            return
        for name in artifact.record.files:
            (local / name).unlink(missing_ok=True)
        local.mkdir(exist_ok=True)
        write_atomically(local / RECORD_FILE, text)


def _is_copy_of(local: Path, text: str) -> bool:
    file = local / RECORD_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == text


def open_artifact(target: Path | str, stage: str | None = None) -> Artifact:
    """Reads a complete output's record.

    Raises:
        StoreError: nothing is there, it is incomplete, or another stage made it.
    """
    home = str(target)
    return _opened(home, _read(home, RECORD_FILE), stage)


def _opened(home: str, text: str | None, stage: str | None) -> Artifact:
    """The output with this record."""
    if text is None:
        claimed = _read(home, CLAIM_FILE) is not None
        state = "is not complete (its stage was interrupted)" if claimed else "holds no output"
        raise StoreError(f"{home} {state}", expected=f"a folder with {RECORD_FILE}", fix="run the stage that makes it")
    try:
        record = Record(**json.loads(text))
    except (TypeError, ValueError):
        name = storage.join(home, RECORD_FILE)
        raise StoreError(f"{name} was written by another version", fix=f"remove {home} and run again") from None
    if stage is not None and record.stage != stage:
        raise StoreError(f"{home} is the output of another stage", got=record.stage, expected=stage)
    return Artifact(home=home, record=record)


def complete_below(folder: str) -> list[str]:
    """Where the complete outputs of a folder lie, ``<folder>/<name>``, sorted."""
    if not storage.is_remote(folder):
        return sorted(str(file.parent) for file in Path(folder).glob(f"*/{RECORD_FILE}"))
    # Not by a pattern: the folder's own name may hold what means something in one.
    below = f"{folder.rstrip('/')}/"
    records = [e.path for e in storage.list_files(below) if e.path.endswith(f"/{RECORD_FILE}")]
    return [path.removesuffix(f"/{RECORD_FILE}") for path in records if path.removeprefix(below).count("/") == 1]


def void(artifact: Artifact) -> None:
    """Takes an output's record away: it is to be made again."""
    if storage.is_remote(artifact.home):
        storage.delete([storage.join(artifact.home, RECORD_FILE)])
    (local_copy(artifact.home) / RECORD_FILE).unlink(missing_ok=True)


def discard(home: str, folder: str, tell: Callable[[str], None] = _LOG.warning) -> None:
    """Removes a folder of an output that has served. Nothing is lost if that fails: ``tell`` is told, and no one else.

    A key to a bucket may allow to write and not to delete.
    """
    local, failure = local_copy(home), ""
    if storage.is_remote(home):
        try:
            # Those known here as well: a listing may lag.
            known = {
                storage.join(home, p.relative_to(local).as_posix()) for p in (local / folder).rglob("*") if p.is_file()
            }
            listed = {entry.path for entry in storage.list_files(storage.join(home, folder) + "/")}
            storage.delete(sorted(known | listed))
        except (StoreError, storage.StorageUnavailableError) as error:
            failure = str(error)
    shutil.rmtree(local / folder, ignore_errors=True)
    if not failure and (local / folder).exists():
        failure = f"{local / folder} is still there"
    if failure:
        tell(f"note: {storage.join(home, folder)} has served and could not be removed: {failure}")


def _read(home: str, name: str) -> str | None:
    """A small file of an output, or None if there is none."""
    if storage.is_remote(home):
        found = storage.find_bytes(storage.join(home, name))
        return None if found is None else found[0].decode(errors="replace")
    file = Path(home) / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def check_writable(target: Path | str) -> None:
    """Tries to write into the store, before anything slow starts.

    Raises:
        StoreError: it cannot be.
    """
    home = str(target)
    if storage.is_remote(home):
        storage.check_access(home, write=True)
    store = local_copy(home)
    with disk_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass


def _complete(home: str, claim: Mapping[str, Any]) -> Artifact | None:
    """The output if it is there already; an error if the folder is not for it."""
    text = _read(home, RECORD_FILE)
    if text is None or not storage.is_remote(home):
        _check_claim(home, claim)
    if text is None:
        return None
    found = _opened(home, text, None)
    if found.record.digest != claim["digest"]:
        _check_claim(home, claim)
    return dataclasses.replace(found, reused=True)


def _check_claim(home: str, claim: Mapping[str, Any]) -> None:
    text = _read(home, CLAIM_FILE)
    if text is None:
        if _is_used(home):
            raise StoreError(f"The output folder {home} is not empty and not an output of ours", fix="name another")
        return
    file = storage.join(home, CLAIM_FILE)
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise StoreError(f"{file} is damaged", fix=f"remove {home} and run again") from None
    if not isinstance(found, dict) or not {"stage", "digest"} <= found.keys():
        raise StoreError(f"{file} is damaged", fix=f"remove {home} and run again")
    if found["digest"] == claim["digest"]:
        return
    different = list(differences(found, claim))
    raise StoreError(
        f"The output folder {home} belongs to another run of `{found['stage']}`",
        got="; ".join(different[:5]) or "the same config made by another version of the code",
        expected="an empty folder or one made by this very config",
        fix="name another folder, or remove this one"
        + ("" if _read(home, RECORD_FILE) else " (its stage was never completed: nothing is lost)"),
    )


def _is_used(home: str) -> bool:
    """Whether something lies there; a process killed before its claim was in place leaves a temporary file."""
    if storage.is_remote(home):
        return bool(storage.list_files(home + "/"))
    folder = Path(home)
    return folder.is_dir() and any(not p.name.startswith(f".{CLAIM_FILE}.") for p in folder.iterdir())
