"""Models as plain folders: what they compute, what is in them, and that a failed export leaves nothing."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_train import named_models
from dpo_train.artifacts import Artifact
from dpo_train.config import ModelConfig
from dpo_train.errors import MissingPackageError, ModelError, RunError, StoreError
from dpo_train.export import CONVERTERS, Hub, HubError, export
from dpo_train.model.load import load_policy
from dpo_train.named_models import NamedModel
from tests.hub import HubServer, hub_server
from tests.projects import Project, project
from tests.tiny import CHAT_TEMPLATE

__all__ = ["hub_server", "project"]

LAYOUT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja"}  # fmt: skip
IDS_BT = torch.arange(3, 43)[None]


def plain(folder: Path) -> NamedModel:
    """A model as it lies in a folder."""
    return NamedModel(name="plain", about=str(folder), digest="", model=ModelConfig(path=str(folder)))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(IDS_BT).logits
    return result


@torch.no_grad()
def policy_logits(project: Project, policy: Artifact) -> torch.Tensor:
    result: torch.Tensor = (
        load_policy(project.config.model, device=torch.device("cpu"), weights=policy.path).model(IDS_BT).logits
    )
    return result


@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_exported_training_computes_what_the_policy_does(project: Project, tmp_path: Path, kind: str) -> None:
    """Adapters are merged; logits agree to 1e-5 of their norm, and differ from the base's by far more."""
    policy = getattr(project, kind)
    sizes = export(named_models.of_training(project.config, policy), str(tmp_path / "out"))

    wanted, base = policy_logits(project, policy), logits(Path(project.config.model.path))
    found = logits(tmp_path / "out")
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (base - wanted).norm() > 0.01 * wanted.norm()
    assert set(sizes) == LAYOUT
    assert sizes == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}


def test_tokenizer_and_template_lie_beside_the_weights(project: Project, tmp_path: Path) -> None:
    """AutoTokenizer reads the folder itself, and renders as training did."""
    export(named_models.of_training(project.config, project.adapters), str(tmp_path / "out"))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "tell me"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\ntell me<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


def test_own_chat_template_goes_with_the_model(project: Project, tmp_path: Path) -> None:
    """Trained with another template than its tokenizer's, a model is served with that one."""
    own = CHAT_TEMPLATE.replace("assistant", "helper")
    export(named_models.of_training(project.config, project.adapters), str(tmp_path / "out"), chat_template=own)

    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == own


def test_registered_version_is_exported_as_it_is(project: Project, tmp_path: Path) -> None:
    """Byte for byte what the registry holds of the model, its card too; the adapter stays there."""
    champion = named_models.registered(project.config, "champion")
    export(champion, str(tmp_path / "out"))

    assert {file.name for file in (tmp_path / "out").iterdir()} == LAYOUT | {"README.md"}
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (Path(champion.model.path) / file.name).read_bytes()
    assert project.adapters.record.digest in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("source", ["policy", "champion"])
def test_dtype_is_that_of_weights_and_config(project: Project, tmp_path: Path, source: str) -> None:
    """In bfloat16 every weight is the policy's, rounded; transformers loads it as that without being told."""
    named = named_models.find(project.config, source, project.adapters)
    for dtype in ("float32", "bfloat16"):
        export(named, str(tmp_path / dtype), dtype=dtype)

    whole, half = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype is torch.bfloat16


def test_weight_beyond_float16_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """100,000 would become infinite; the message names the weight, and no folder is left."""
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"model\.norm\.weight does not fit into float16"):
        export(plain(tmp_path / "model"), str(tmp_path / "out"), dtype="float16")

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_json_names_a_place_on_this_machine(project: Project, model_folder: Path, tmp_path: Path) -> None:
    """Neither of what we wrote, nor what an older base says of itself or of a part; a name of the hub is kept."""
    shutil.copytree(model_folder, tmp_path / "old")
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"] = {"hidden_size": 32}
    place = {"_name_or_path": str(model_folder)}
    old = {**config, **place, "text_config": {**config["text_config"], **place}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": "org/base"}))

    export(plain(tmp_path / "old"), str(tmp_path / "first"))
    export(named_models.of_training(project.config, project.adapters), str(tmp_path / "second"))

    for folder in ("first", "second"):
        texts = [file.read_text() for file in (tmp_path / folder).glob("*.json")]
        assert not [text for text in texts if str(tmp_path.parent) in text or str(model_folder) in text]
    assert json.loads((tmp_path / "first" / "config.json").read_text()) == config
    assert json.loads((tmp_path / "first" / "tokenizer_config.json").read_text())["name_or_path"] == "org/base"


def test_licence_of_the_base_goes_along(project: Project, model_folder: Path, tmp_path: Path) -> None:
    """What came with the base's weights comes with those made of them."""
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "LICENSE.txt").write_text("yours\n")
    named = named_models.of_training(project.config, project.adapters)
    export(replace(named, model=ModelConfig(path=str(tmp_path / "base"))), str(tmp_path / "out"))

    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "yours\n"


def test_all_files_can_be_read_by_whoever_reads_the_config(model_folder: Path, tmp_path: Path) -> None:
    """A server that runs as another user must be able to load the weights."""
    export(plain(model_folder), str(tmp_path / "out"), dtype="bfloat16")

    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


def test_used_target_is_refused_and_an_empty_one_taken(model_folder: Path, tmp_path: Path) -> None:
    """A folder with something in it, or a file, stays as it is."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()

    for name in ("used", "file"):
        with pytest.raises(StoreError, match=f"There is something at .*{name} already"):
            export(plain(model_folder), str(tmp_path / name))
    export(plain(model_folder), str(tmp_path / "empty"))

    assert (tmp_path / "used" / "note").read_text() == (tmp_path / "file").read_text() == "mine"
    assert set(LAYOUT) <= {file.name for file in (tmp_path / "empty").iterdir()}


def test_mount_point_is_refused_before_anything_is_written(model_folder: Path) -> None:
    """A folder cannot be renamed to one."""
    said: list[str] = []
    with pytest.raises(StoreError, match=r"/proc is a mount point.*name a folder in it"):
        export(plain(model_folder), "/proc", tell=said.append)
    assert not said


def test_mount_that_shows_only_when_it_is_written_to_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the same disk mounted there looks like any folder; the system says EBUSY. Nothing is left."""

    def busy(folder: Path, target: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder), None, str(target))

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(StoreError, match="out is a mount point"):
        export(plain(model_folder), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_target_that_is_used_meanwhile_is_left_alone(model_folder: Path, tmp_path: Path) -> None:
    """Between the check and the end somebody else writes there: theirs stays, ours goes."""

    def meanwhile(_: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "note").write_text("theirs")

    with pytest.raises(StoreError, match="Someone else has written"):
        export(plain(model_folder), str(tmp_path / "out"), tell=meanwhile)

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note"]


def converter(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, name: str = CONVERTERS[0]) -> Path:
    """A program in place of llama.cpp's, first on the PATH."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / name


@pytest.mark.parametrize("name", CONVERTERS)
def test_gguf_is_written_by_the_converter(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is given a whole model folder, the file to write, and the type that belongs to the dtype."""
    said = tmp_path / "said"
    converter(
        tmp_path / "bin", f'echo "$@" >{said}; cat "$1/config.json" >/dev/null && echo gguf >"$3"', monkeypatch, name
    )

    sizes = export(plain(model_folder), str(tmp_path / "out"), dtype="bfloat16", gguf=True)

    assert sizes["out.gguf"] == 5
    assert (tmp_path / "out" / "out.gguf").read_text() == "gguf\n"
    folder, *options = said.read_text().split()
    assert options == ["--outfile", f"{folder}/out.gguf", "--outtype", "bf16"]


@pytest.mark.parametrize("body", ["echo loading; echo 'Model FooForCausalLM is not supported' >&2; exit 3", "exit 0"])
def test_failed_converter_leaves_nothing_and_is_quoted(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """Its last line and its exit code are the error; a converter that wrote nothing has failed too."""
    converter(tmp_path / "bin", body, monkeypatch)

    with pytest.raises(RunError) as caught:
        export(plain(model_folder), str(tmp_path / "out"), gguf=True)

    if "exit 3" in body:
        assert "did not write out.gguf: Model FooForCausalLM is not supported. Got: exit code 3." in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_missing_converter_is_said_before_anything_is_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    with pytest.raises(MissingPackageError, match=r"llama\.cpp"):
        export(plain(model_folder), str(tmp_path / "out"), gguf=True, tell=said.append)
    assert not said
    assert not list(tmp_path.iterdir())


def test_push_is_one_commit_to_a_private_repository(model_folder: Path, tmp_path: Path, hub_server: HubServer) -> None:
    """The hub gets exactly the folder's files; weights of an earlier push are deleted in the same commit."""
    hub_server.files = {"model-00001-of-00002.safetensors": b"weights", "README.md": b"words"}

    sizes = export(plain(model_folder), str(tmp_path / "out"), hub=Hub(repository="org/name"))

    assert hub_server.created == [{"name": "name", "organization": "org", "visibility": "private"}]
    (commit,) = hub_server.commits
    assert {name: len(content) for name, content in commit.added.items()} == sizes
    assert commit.added["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
    assert commit.deleted == ["model-00001-of-00002.safetensors"]


def test_public_repository_is_asked_for(model_folder: Path, tmp_path: Path, hub_server: HubServer) -> None:
    """Only on request."""
    export(plain(model_folder), str(tmp_path / "out"), hub=Hub(repository="org/name", public=True))
    assert hub_server.created[0]["visibility"] == "public"


def test_refused_token_is_one_line_before_anything_is_written(
    model_folder: Path, tmp_path: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked who we are first."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"does not take org/name.*the token must be one that may write") as caught:
        export(plain(model_folder), str(tmp_path / "out"), hub=Hub(repository="org/name"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refused_push_leaves_the_folder(model_folder: Path, tmp_path: Path, hub_server: HubServer) -> None:
    """What was written is complete, so that only the push has to be tried again."""
    hub_server.refuse_commits = True
    with pytest.raises(HubError, match="does not take org/name"):
        export(plain(model_folder), str(tmp_path / "out"), hub=Hub(repository="org/name"))
    assert set(LAYOUT) <= {file.name for file in (tmp_path / "out").iterdir()}
