"""Data sets that `datasets` loads."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from dpo_train.config import SourceConfig
from dpo_train.data.sources import base, hub, plan, read_block, source_digest
from dpo_train.errors import DataError, MissingPackageError
from tests.unit.data.test_sources import read

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found that another test loaded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    hub._load.cache_clear()


def _repo(folder: Path, count: int) -> str:
    """A data set as a repository without a script holds it."""
    folder.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": f"{split} {i}", "turns": [{"role": "user"}]}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return f"hf://{folder}"


def test_a_repository_is_read_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks know their first row and cross process borders; the split is chosen by `hub_split`."""
    path = _repo(tmp_path / "set", 7)
    monkeypatch.setattr(base, "BLOCK_BYTES", 100)
    blocks = plan(SourceConfig(path=path, hub_split="test"), 0)
    assert len(blocks) > 1
    found = [record for block in pickle.loads(pickle.dumps(blocks)) for record in read_block(block)]
    assert [(record.line, record.value["prompt"]) for record in found] == [(i + 1, f"test {i}") for i in range(7)]
    assert found[0].value["turns"] == [{"role": "user"}]


def test_part_of_a_split_is_read(tmp_path: Path) -> None:
    """In the words of `datasets`."""
    path = _repo(tmp_path / "set", 10)
    assert [value["prompt"] for _, value in read(path, hub_split="train[2:4]")] == ["train 2", "train 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hub_split": "dev"}, 'Unknown split "dev"'), ({"hub_config": "other"}, "'other' not found")],
)
def test_what_a_data_set_does_not_have_is_an_error(tmp_path: Path, options: dict[str, str], message: str) -> None:
    """With what it has, in the words of `datasets`."""
    with pytest.raises(DataError, match=message):
        plan(SourceConfig(path=_repo(tmp_path / "set", 2), **options), 0)  # type: ignore[arg-type]


def test_a_data_set_that_does_not_exist_is_an_error() -> None:
    """Offline, as tests are, it says that the hub was not reached."""
    with pytest.raises(DataError, match="hf://nobody/nothing cannot be loaded"):
        plan(SourceConfig(path="hf://nobody/nothing"), 0)


def test_digest_is_that_of_the_rows(tmp_path: Path) -> None:
    """The same rows in another folder have it too; other rows, or another split, have not."""
    first, second, third = (_repo(tmp_path / name, count) for name, count in (("a", 3), ("b", 3), ("c", 4)))

    def digest(path: str, split: str = "train") -> str:
        return source_digest(SourceConfig(path=path, hub_split=split))

    assert digest(first) == digest(second)
    assert len({digest(first), digest(third), digest(first, "test"), digest(first, "train[:1]")}) == 4


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"dpo-train\[hub\]"):
        plan(SourceConfig(path="hf://a/b"), 0)
