"""safetensors files, read by rows and written one weight after another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_train.errors import ModelError
from dpo_train.model import weight_files
from dpo_train.model.save import write_model
from dpo_train.model.weight_files import INDEX_FILE, SINGLE_FILE, WeightFiles, WeightWriter
from tests.unit.model.families import FAMILIES, write

EXPERTS = ("mixtral", "qwen3_moe")


def test_rows_of_a_weight_are_read_whichever_file_it_lies_in(tmp_path: Path) -> None:
    """Rows 1 and 2 of the one, nothing of the other, a scalar; shapes without reading."""
    one_RD, other_RD = torch.arange(12.0).reshape(4, 3), torch.zeros(5, 2)
    save_file({"one": one_RD}, tmp_path / "a.safetensors")
    save_file({"other": other_RD, "scalar": torch.tensor(7.0)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"one": "a.safetensors", "other": "b.safetensors", "scalar": "b.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with WeightFiles(tmp_path) as files:
        assert sorted(files.names) == ["one", "other", "scalar"]
        assert torch.equal(files.read("one", (slice(1, 3),)), one_RD[1:3])
        assert files.read("other", (slice(5, 5),)).shape == (0, 2)
        assert files.read("scalar").item() == 7.0
        assert (files.shape("one"), files.shape("scalar")) == ((4, 3), ())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SINGLE_FILE).unlink(), f"it has no weights. Expected: {SINGLE_FILE} or {INDEX_FILE}"),
        (lambda folder: (folder / SINGLE_FILE).write_bytes((folder / SINGLE_FILE).read_bytes()[:-1]), SINGLE_FILE),
        (lambda folder: (folder / SINGLE_FILE).rename(folder / INDEX_FILE), INDEX_FILE),
    ],
    ids=["none", "cut short", "no index"],
)  # fmt: skip
def test_weights_that_cannot_be_read_are_told_by_file(tmp_path: Path, damage: object, message: str) -> None:
    """A download that broke off, say."""
    save_file({"w": torch.ones(3)}, tmp_path / SINGLE_FILE)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelError, match=f"cannot be loaded: {message}"):
        WeightFiles(tmp_path)


def test_file_that_the_index_names_and_is_not_there_is_told(tmp_path: Path) -> None:
    """One of many was not downloaded."""
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "model-00002-of-00009.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00002-of-00009\.safetensors: No such file"):
        WeightFiles(tmp_path)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), most=st.integers(4, 80))
def test_weights_are_split_as_the_hub_splits_them(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    """Any weights into files of at most so many bytes, one that is larger into a file of its own; bit for bit."""
    folder = tmp_path_factory.mktemp("split")
    weights = {f"w{number}": torch.full((size,), number, dtype=torch.int16) for number, size in enumerate(sizes)}
    writer = WeightWriter(folder, max_file_bytes=most)
    for name, tensor in weights.items():
        writer.add(name, tensor)
    writer.finish(num_parameters=sum(sizes))

    wanted = split_torch_state_dict_into_shards(
        weights, max_shard_size=most, filename_pattern="model{suffix}.safetensors"
    )
    found = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert {name: sorted(tensors) for name, tensors in found.items()} == {
        name: sorted(names) for name, names in wanted.filename_to_tensors.items()
    }
    for tensors in found.values():
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= most
    if wanted.is_sharded:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert index["weight_map"] == wanted.tensor_to_filename
        assert index["metadata"] == {"total_parameters": sum(sizes), **wanted.metadata}
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("most", [10**9, 20_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_model_is_what_save_pretrained_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, most: int
) -> None:
    """Every file byte for byte: weights tied and renamed, config, index. Experts in several files only by content,
    because transformers puts views of one weight into one file, however large it becomes."""
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", most)
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "base", FAMILIES[family]))
    write_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("ours", "theirs"))
    if family not in EXPERTS or most == 10**9:
        assert ours == theirs
    assert all(len(content) <= most + 5000 for content in ours.values())  # headers

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
