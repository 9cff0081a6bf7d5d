"""What people get wrong, each as they meet it: one clear message, exit code 2 (1 for a full disk), no traceback."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_train.config import load_config
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess
from tests.command import Finished, dpo, refused, write_config
from tests.tiny import tiny_config


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_config(tiny_config(tmp_path, tracking__uri=None), tmp_path / "config.yaml")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def prepared(config_file: Path, output: Path) -> Path:
    """Pairs in a folder of that name."""
    prepare(load_config(config_file), InProcess(), output=output)
    return output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.beta=1", "did you mean 'train'"),
        ("train.bta=1", "did you mean 'train.beta'"),
        ("train.beta=much", "'train.beta' should be a valid number, got 'much'"),
        ("train.beta=-1", "greater than 0"),
        ("train.beta", "section.key=value"),
        ("model.path=/no/such/model", "There is no model folder /no/such/model"),
        ("prepare.path=/no/such/data.jsonl", "There is no data at /no/such/data.jsonl"),
        ("train.label_smoothing=0.1 train.loss=ipo", "no meaning with the ipo loss"),
    ],
)
def test_wrong_value_is_named_before_anything_starts(
    config_file: Path, capfd: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    """The message names the key or path and what was expected."""
    assert words in refused(capfd, "run", config_file, *override.split(), "compute.executor=local")
    assert not (config_file.parent / "store" / "prepare").exists()


def test_missing_config_says_how_to_get_one(tmp_path: Path) -> None:
    """`dpo init` is the way. In a process of its own, as all of these are for a person."""
    check(dpo("run", str(tmp_path / "none.yaml")), 2, "dpo init")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00 not text\n" * 3, "undecodable"),
        (b'{"question": "a", "answer": "b"}\n' * 3, "Got: the fields question, answer."),
    ],
    ids=["empty", "binary", "other fields"],
)
def test_useless_data_file_is_explained(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    """Nothing to train on: the reasons, with an example."""
    (tmp_path / "pairs.jsonl").write_bytes(content)

    assert words in refused(capfd, "prepare", config_file)
    assert list((tmp_path / "store").glob("*/*/record.json")) == []


def test_folder_of_another_config_is_refused_with_the_difference(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--output names a folder that holds pairs made with another template."""
    output = prepared(config_file, tmp_path / "pairs")
    before = (output / "record.json").read_text()

    text = refused(capfd, "prepare", config_file, "prepare.template=plain", "--output", output)

    assert "template was 'chat', is now 'plain'" in text
    assert (output / "record.json").read_text() == before


def test_foreign_folder_is_refused_and_left_alone(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--output names a folder with somebody's files."""
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")

    assert "not an output of ours" in refused(capfd, "prepare", config_file, "--output", output)
    assert (output / "thesis.tex").read_text() == "years of work"


def test_input_of_the_wrong_stage_is_refused(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pairs where scored pairs are wanted."""
    output = prepared(config_file, tmp_path / "pairs")

    assert "output of another stage" in refused(capfd, "sweep", config_file, "--scored", output)


def test_store_that_cannot_be_written(config_file: Path, tmpfs: Path) -> None:
    """A read-only file system."""
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)

    check(dpo("run", str(config_file), f"store={tmpfs}/store"), 2, "cannot be written")


def test_full_disk_fails_the_run_and_leaves_nothing_complete(config_file: Path, tmpfs: Path) -> None:
    """The disk fills up while pairs are scored; the output does not count."""
    pairs = prepared(config_file, tmpfs.parent / "pairs")
    filler = tmpfs / "filler"
    filler.write_bytes(bytes(1024 * 1024 - 3 * os.statvfs(tmpfs).f_bsize))
    output = tmpfs / "scored"

    finished = dpo("score-reference", str(config_file), "--pairs", str(pairs), "--output", str(output))

    check(finished, 1, "is full")
    assert not (output / "record.json").exists()
    filler.unlink()
    assert dpo("score-reference", str(config_file), "--pairs", str(pairs), "--output", str(output)).code == 0
    assert json.loads((output / "record.json").read_text())["stage"] == "score_reference"


def test_full_disk_under_the_whole_store(config_file: Path, tmpfs: Path) -> None:
    """Log, events and MLflow's file lie there too; still one message."""
    (tmpfs / "filler").write_bytes(bytes(700 * 1024))
    finished = dpo(
        "prepare", str(config_file), f"store={tmpfs}/store", "tracking.uri=sqlite:////" + str(tmpfs) + "/m.db"
    )

    assert finished.code == 1, finished.output
    assert "full" in finished.output
    assert "Traceback" not in finished.output


def test_data_that_cannot_be_read(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file of which the system shows nothing."""
    broken = config_file.parent / "broken.jsonl"
    broken.symlink_to("/proc/self/mem")

    assert "is empty" in refused(capfd, "run", config_file, f"prepare.path={broken}")


def test_overrides_may_follow_an_option(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """argparse alone would refuse them."""
    assert "did you mean 'train.beta'" in refused(capfd, "run", config_file, "--name", "x", "train.bta=0.2")


def check(finished: Finished, code: int, words: str) -> None:
    """The exit code, the words (wherever the terminal broke its lines), and no traceback."""
    text = " ".join(finished.output.split())
    assert finished.code == code, finished.output
    assert words in text
    assert "Traceback" not in text
