"""A policy as a plain folder: merged weights are proven, and generation ends where the answers ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train.config import ModelConfig
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import RunError
from dpo_train.model.export import export_policy
from dpo_train.model.load import load_policy, save_policy
from tests.tiny import tiny_model, tiny_policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that changed the logits by some percent."""
    folder = tmp_path_factory.mktemp("trained")
    policy = tiny_policy(base)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_policy(policy, folder, load_tokenizer(base))
    return folder


def test_folder_computes_what_the_adapter_on_its_base_does(base: Path, trained: Path, tmp_path: Path) -> None:
    """The largest difference of logits is rounding; the adapter's own change is ten thousand times that."""
    export_policy(ModelConfig(path=str(base)), trained, tmp_path, load_tokenizer(base))

    ids_BT = torch.arange(3, 43).view(2, 20)
    cpu = torch.device("cpu")
    wanted = load_policy(ModelConfig(path=str(base)), device=cpu, weights=trained).model(ids_BT).logits
    found = load_policy(ModelConfig(path=str(tmp_path / "model")), device=cpu).model(ids_BT).logits
    plain = load_policy(ModelConfig(path=str(base)), device=cpu).model(ids_BT).logits
    off, change = (found - wanted).abs().max(), (plain - wanted).abs().max()
    assert off < 1e-4 * change
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("wrong", ["left out", "half"])
def test_weights_that_do_not_compute_it_are_refused(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """An adapter that the merge leaves out, or scales wrongly, is told by the files that were written."""
    from peft.tuners.lora import LoraModel

    merge = LoraModel.merge_and_unload

    def merge_wrongly(model: Any) -> Any:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 0.0 if wrong == "left out" else 0.5
        return merge(model)

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(RunError, match=r"merged weights do not compute.*the training changed"):
        export_policy(ModelConfig(path=str(base)), trained, tmp_path, load_tokenizer(base))


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, 2), ({"eos_token_id": 2}, 2), ({"eos_token_id": 7}, [7, 2]), ({"eos_token_id": [7, 2]}, [7, 2])],
)
def test_generation_ends_at_the_tokenizers_end_too(
    base: Path, tmp_path: Path, before: dict[str, Any] | None, after: Any
) -> None:
    """A base whose generation config lacks the chat's end token would never stop; what else it says stays."""
    model = tmp_path / "trained" / "model"
    model.mkdir(parents=True)
    if before is not None:
        (model / "generation_config.json").write_text(json.dumps({**before, "top_p": 0.9}))

    export_policy(ModelConfig(path=str(base)), model.parent, tmp_path / "out", load_tokenizer(base))

    made = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert made == {"eos_token_id": after, **({} if before is None else {"top_p": 0.9})}
