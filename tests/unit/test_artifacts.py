"""An output is complete or invisible, and its address is its identity."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dpo_train.artifacts import (
    CLAIM_FILE,
    RECORD_FILE,
    Artifact,
    Output,
    Summary,
    open_artifact,
    produce,
)
from dpo_train.disk import digest_path, write_atomically
from dpo_train.errors import StoreError
from dpo_train.identity import code_version, identity

CONFIG = {"beta": 0.1, "lora": {"rank": 4}}
INPUTS = {"pairs": "abc"}


class KilledError(BaseException):
    """Stands for a killed process: nothing may rely on catching it."""


def _write(output: Output) -> Summary:
    (output.path / "data.txt").write_text("content")
    return Summary(counts={"records": 3}, metrics={"loss": 0.5}, details={"note": "x"})


def _produce(target: Path, body: Any = _write, config: Any = CONFIG, inputs: Any = INPUTS, **options: Any) -> Artifact:
    return produce("train", config, inputs, target, body, **options)


def _never(output: Output) -> Summary:
    raise AssertionError("a complete output was made again")


def _killed(output: Output) -> Summary:
    (output.path / "half.txt").write_text("half")
    raise KilledError


def test_record_says_what_was_made_from_what(tmp_path: Path) -> None:
    """Stage, digest, config, inputs, code, counts, metrics and library versions; the address names stage and digest."""
    made = _produce(tmp_path / "out")
    assert not made.reused
    record = open_artifact(tmp_path / "out").record
    assert record == made.record
    assert (record.stage, record.config, record.inputs) == ("train", CONFIG, INPUTS)
    assert (record.counts, record.metrics, record.details) == ({"records": 3}, {"loss": 0.5}, {"note": "x"})
    assert record.digest == identity("train", CONFIG, INPUTS)
    assert record.code_version == code_version()
    assert {"torch", "numpy", "pyarrow"} <= set(record.versions)
    assert made.address == f"train/{record.digest}"
    assert (tmp_path / "out" / "data.txt").read_text() == "content"


def test_identity_is_content_and_config_only() -> None:
    """The order of keys does not matter; stage, config and inputs do."""
    same = identity("train", {"lora": {"rank": 4}, "beta": 0.1}, INPUTS)
    assert identity("train", CONFIG, INPUTS) == same
    others = {
        identity("sweep", CONFIG, INPUTS),
        identity("train", {**CONFIG, "beta": 0.2}, INPUTS),
        identity("train", CONFIG, {"pairs": "abd"}),
    }
    assert len(others | {same}) == 4
    assert len(same) == 16


def test_complete_output_is_reused(tmp_path: Path) -> None:
    """The second call makes nothing and hands back the same record."""
    first = _produce(tmp_path / "out")
    second = _produce(tmp_path / "out", _never)
    assert second.reused
    assert second.record == first.record


def test_interrupted_output_is_invisible_and_made_again(tmp_path: Path) -> None:
    """No record, so it cannot be opened; the next run starts from an empty folder."""
    with pytest.raises(KilledError):
        _produce(tmp_path / "out", _killed)
    assert (tmp_path / "out" / "half.txt").exists()
    with pytest.raises(StoreError, match=r"is not complete \(its stage was interrupted\)"):
        open_artifact(tmp_path / "out")
    assert not _produce(tmp_path / "out").reused
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CLAIM_FILE, "data.txt", RECORD_FILE]


def test_resumable_output_goes_on_from_what_is_there(tmp_path: Path) -> None:
    """The body finds the files of the interrupted run."""
    with pytest.raises(KilledError):
        _produce(tmp_path / "out", _killed, resumable=True)
    seen: list[str] = []

    def body(output: Output) -> Summary:
        seen.extend(p.name for p in output.path.iterdir())
        return _write(output)

    _produce(tmp_path / "out", body, resumable=True)
    assert sorted(seen) == [CLAIM_FILE, "half.txt"]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "incomplete"])
@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize(
    ("config", "inputs", "difference"),
    [
        ({**CONFIG, "beta": 0.2}, INPUTS, "config.beta was 0.1, is now 0.2"),
        ({**CONFIG, "lora": {"rank": 8}}, INPUTS, "config.lora.rank was 4, is now 8"),
        ({**CONFIG, "seed": 1}, INPUTS, "config.seed was None, is now 1"),
        (CONFIG, {"pairs": "abd"}, "inputs.pairs was 'abc', is now 'abd'"),
    ],
)
def test_folder_of_another_config_is_refused_with_the_difference(
    tmp_path: Path, complete: bool, resumable: bool, config: Any, inputs: Any, difference: str
) -> None:
    """Whether it is complete or not, nothing in it is touched."""
    if complete:
        _produce(tmp_path / "out")
    else:
        with pytest.raises(KilledError):
            _produce(tmp_path / "out", _killed)
    before = digest_path(tmp_path / "out")
    with pytest.raises(StoreError, match="belongs to another run of `train`") as caught:
        _produce(tmp_path / "out", _never, config, inputs, resumable=resumable)
    assert f"Got: {difference}." in str(caught.value)
    assert digest_path(tmp_path / "out") == before


def test_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A wrong path must not empty somebody's folder."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not an output of ours"):
        _produce(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_damaged_claim_is_refused(tmp_path: Path) -> None:
    """Whose folder it is cannot be said any more."""
    (tmp_path / CLAIM_FILE).write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        _produce(tmp_path)


def test_leftover_of_a_claim_that_was_being_written_does_not_block(tmp_path: Path) -> None:
    """A process killed before its claim was renamed into place leaves a hidden file and nothing else."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{CLAIM_FILE}.4711").write_text('{"stage"')
    assert not _produce(tmp_path / "out").reused


def test_kill_while_the_incomplete_folder_is_emptied_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying right after the claim is deleted must not leave a folder that nobody knows as ours.

    With 200 files the claim is all but surely not the last one that the operating system lists.
    """
    with pytest.raises(KilledError):
        _produce(tmp_path / "out", _killed)
    for number in range(200):
        (tmp_path / "out" / str(number)).touch()
    unlink = os.unlink

    def dies(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if Path(path).name == CLAIM_FILE:
            raise KilledError

    with monkeypatch.context() as patch, suppress(KilledError):
        patch.setattr(os, "unlink", dies)
        _produce(tmp_path / "out")
    assert _produce(tmp_path / "out").record.counts == {"records": 3}


def test_output_of_another_stage_is_refused(tmp_path: Path) -> None:
    """A path given to the wrong stage is named as what it is."""
    _produce(tmp_path / "out")
    assert open_artifact(tmp_path / "out", "train").record.stage == "train"
    with pytest.raises(StoreError, match=r"Got: train\. Expected: evaluate\."):
        open_artifact(tmp_path / "out", "evaluate")
    with pytest.raises(StoreError, match="holds no output"):
        open_artifact(tmp_path / "absent")


def test_config_is_recorded_as_plain_json(tmp_path: Path) -> None:
    """Tuples become lists before they are compared, so that the same config is the same after reading it back."""
    _produce(tmp_path / "out", config={"betas": (0.1, 0.2)})
    assert _produce(tmp_path / "out", _never, config={"betas": [0.1, 0.2]}).reused


def test_atomic_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """What cannot be written is not begun, and no temporary file stays."""
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_digest_of_a_file_is_framed_by_its_size(tmp_path: Path) -> None:
    """SHA-256 over ".", size and content: worked out here by hand; the file's own name does not count."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"xyz")
        assert digest_path(tmp_path / name) == hashlib.sha256(b".\0" + b"3\0" + b"xyz").hexdigest()


def test_digest_of_a_folder_is_names_and_contents(tmp_path: Path) -> None:
    """A moved byte, a renamed file and an added file each change it; hidden files do not."""

    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            (folder / name.replace("_", "/")).parent.mkdir(parents=True, exist_ok=True)
            (folder / name.replace("_", "/")).write_text(content)
        (folder / ".hidden").write_text(str(folder))
        return digest_path(folder)

    base = digest(a="12", sub_b="3")
    assert digest(sub_b="3", a="12") == base
    others = [digest(a="1", sub_b="23"), digest(a="12", sub_c="3"), digest(a="12", sub_b="3", d=""), digest(a="12")]
    assert len({base, *others}) == 5


def test_digest_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Otherwise every missing path would have one and the same digest."""
    with pytest.raises(StoreError, match=r"There is nothing at .*/absent"):
        digest_path(tmp_path / "absent")


def test_code_version_is_the_same_within_a_process() -> None:
    """Package version and a digest of the sources."""
    version, digest = code_version().split("+")
    assert version
    assert len(digest) == 12
    assert json.dumps(code_version()) == json.dumps(code_version())
