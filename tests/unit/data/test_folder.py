"""A model's folder and the digests of what lies in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from dpo_train.data.folder import model_folder as find
from dpo_train.data.folder import tokenizer_digest, weights_digest
from dpo_train.errors import ModelError
from tests.hub import HubServer, hub_server
from tests.tiny import tiny_model

__all__ = ["hub_server"]


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_folder_is_its_own_address(model_folder: Path) -> None:
    """A local folder needs no hub."""
    assert find(str(model_folder)) == model_folder


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "There is no model folder"), ("empty", "is not a model folder")],
)
def test_what_is_no_model_folder_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    """A missing absolute path is never looked up on the hub."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        find(str(tmp_path / name))


def test_hub_name_that_cannot_be_reached_is_an_error() -> None:
    """Offline, the message names the model and says what to do."""
    with pytest.raises(ModelError, match=r"'nobody/nothing' is neither a folder here nor to be had from the hub"):
        find("nobody/nothing")


def test_licence_comes_from_the_hub_with_the_model(
    model_folder: Path, tmp_path: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model card, however its name is written; they change no digest, and weights of another kind stay."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    prose = ["Readme.md", "LICENSE", "Notice.txt", "copying", "LICENCE.pdf", "USE_POLICY.md"]
    model = {file.name: file.read_bytes() for file in model_folder.iterdir()}
    hub_server.files = {**model, **dict.fromkeys([*prose, "pytorch_model.bin"], b"words")}

    found = find("org/name")

    assert {file.name for file in found.iterdir()} == {*model, *prose}
    assert weights_digest(found) == weights_digest(model_folder)


def test_same_content_has_the_same_digests_anywhere(model_folder: Path, copy: Path, tmp_path: Path) -> None:
    """A copy, and a second making from the same seed."""
    again = tiny_model(tmp_path / "again")
    for folder in (copy, again):
        assert weights_digest(folder) == weights_digest(model_folder)
        assert tokenizer_digest(folder) == tokenizer_digest(model_folder)


def test_changed_weights_change_the_weights_digest_alone(copy: Path) -> None:
    """One bit of one weight: the reference is another, the pairs' ids are not."""
    before = weights_digest(copy), tokenizer_digest(copy)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_digest(copy) != before[0]
    assert tokenizer_digest(copy) == before[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_changed_tokenizer_file_changes_both_digests(copy: Path, name: str) -> None:
    """The chat template counts as well: it decides what the prompt is."""
    before = weights_digest(copy), tokenizer_digest(copy)
    (copy / name).write_text((copy / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert weights_digest(copy) != before[0]
    assert tokenizer_digest(copy) != before[1]


def test_hidden_files_do_not_count(copy: Path) -> None:
    """Download caches and version control leave files that no one loads."""
    before = weights_digest(copy)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").touch()
    assert weights_digest(copy) == before


def test_named_template_in_a_sub_folder_changes_both_digests(copy: Path) -> None:
    """The tokenizer loads it: another content of it, and another name, are other templates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(copy)
    file = copy / "additional_chat_templates" / "tool_use.jinja"
    digests = [(weights_digest(copy), tokenizer_digest(copy))]
    file.write_text("{{ messages }}{{ tools }}")
    digests.append((weights_digest(copy), tokenizer_digest(copy)))
    file.rename(file.with_name("rag.jinja"))
    digests.append((weights_digest(copy), tokenizer_digest(copy)))
    assert len({weights for weights, _ in digests}) == len({tokenizer for _, tokenizer in digests}) == 3


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "License.txt", "NOTICE", "COPYING.txt", "docs/notes.md"])
def test_what_is_for_people_to_read_does_not_count(copy: Path, name: str) -> None:
    """Nothing is prepared or scored again for a word in a model card."""
    before = weights_digest(copy), tokenizer_digest(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("of any content")
    assert (weights_digest(copy), tokenizer_digest(copy)) == before


@pytest.mark.parametrize("name", ["original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"])
def test_weights_of_other_frameworks_are_no_tokenizer(copy: Path, name: str) -> None:
    """They lie in sub-folders of some models and change with the weights."""
    before = tokenizer_digest(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"weights")
    assert tokenizer_digest(copy) == before
