"""An adapter's folder as PEFT writes it: what it says of itself, whether it can be trained on, its digest. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.config import LoraConfig
from dpo_train.data.folder import ADAPTER_CONFIG, fetched
from dpo_train.disk import digest_path
from dpo_train.errors import ConfigError, ModelError, first_line

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KNOWN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision"),
    *("ensure_weight_tying", "qalora_group_size", "runtime_config"),
}
"""Keys of a config that may have any value: an adapter's shape, where it belongs, and notes that change no number.

Every other key switches something on that a plain low-rank update has not (DoRA, trained embeddings or biases), or that
PEFT may come to have: log-probs, reference, merging and saving know the plain update alone.
"""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to begin that leave the base's weights as they are; PiSSA, OLoRA and LoftQ take something out of them."""


def adapter_folder(path: str) -> Path:
    """The local folder of a LoRA adapter: the path itself, or a copy of what lies at s3://, fetched if need be.

    Raises:
        ModelError: no such folder, weights that are no safetensors, or an adapter that is more than a low-rank update.
    """
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    fix = "set model.adapter to a folder that PEFT wrote"
    folder = fetched(path, "adapter", fix, names) if storage.is_remote(path) else Path(path)
    if not folder.is_dir():
        raise ModelError(f"There is no adapter folder {folder}", fix=fix)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{path} is not an adapter folder",
            got=f"no {' and no '.join(missing)}",
            expected="both as PEFT writes them; a pickle (adapter_model.bin) may run code and is not read",
            fix=fix,
        )
    _check_plain(folder)
    return folder


def adapter_config(folder: Path) -> dict[str, Any]:
    """What the adapter says of itself."""
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{folder / ADAPTER_CONFIG} is not a mapping", got=type(content).__name__)
    return content


def _check_plain(folder: Path) -> None:
    """Whether the adapter is a low-rank update of linear modules and nothing else.

    Raises:
        ModelError: it is not; the message names the keys of its config.
    """
    content = adapter_config(folder)
    wrong = [
        name for name, value in content.items() if name not in _KNOWN and value not in (None, False, "none", [], {})
    ]
    wrong += [name for name, allowed in (("peft_type", ("LORA",)), ("init_lora_weights", _PLAIN_STARTS))
              if content.get(name, allowed[0]) not in allowed]  # fmt: skip
    if wrong:
        raise ModelError(
            f"The adapter in {folder} is of a kind that cannot be trained on",
            got=", ".join(f"{name}={json.dumps(content[name])}" for name in wrong),
            expected="LoRA matrices of linear modules alone, as train.lora makes them",
            fix="merge it into its model with PEFT, and set model.path to what comes of it",
        )


def check_shape(folder: Path, lora: LoraConfig) -> None:
    """An adapter is trained in the shape that it has; a key that was set to something else would not be heard.

    A key at its default says nothing. Which modules are meant, only the model knows (model/adapters.py).

    Raises:
        ConfigError: rank or alpha are set, and not to the adapter's.
    """
    content, default = adapter_config(folder), LoraConfig()
    for name, key in (("rank", "r"), ("alpha", "lora_alpha")):
        wanted, found = getattr(lora, name), content.get(key)
        if wanted not in (found, getattr(default, name)):
            raise ConfigError(
                f"The adapter in {folder} has another {name}, and is trained as it is",
                got=f"lora.{name}={wanted:g}",
                expected=f"{found}",
                fix=f"leave lora.{name} out",
            )


def adapter_digest(folder: Path) -> str:
    """Digest of what is loaded of an adapter."""
    content = "".join(f"{name}\0{digest_path(folder / name)}\0" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256(content.encode()).hexdigest()[:32]
