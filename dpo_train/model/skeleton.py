"""A model without weights, which each rank fills with its own share once it is known which they are.

Between ``build`` and ``drop_memory`` a parameter is one zero that claims to be of full size and on the device: what is
put onto the model, such as adapters, finds all that it looks for. Buffers are true from the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_train.config import ModelConfig
from dpo_train.errors import ModelError, first_line
from dpo_train.model.attention import install
from dpo_train.model.shard import box, like, local
from dpo_train.model.weight_files import WeightFiles
from dpo_train.model.weight_names import Origin, origins, unknown

Place = tuple[nn.Module, str]
"""A module and the name that it has for a weight. Adapters and wrappers change the names of modules, never this."""


class WholeModelNeededError(Exception):
    """The checkpoint says of the model what can only be seen by loading it whole."""


class Skeleton:
    """Without weights until it is filled; knows where each weight lies in the checkpoint."""

    def __init__(self) -> None:
        self._places: dict[str, list[Place]] = {}
        """Of each weight, by any of its names; tied weights are one and have several."""
        self._origins: dict[str, Origin] = {}

    def build(self, folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
        """In place of ``from_pretrained``.

        Raises:
            ModelError: the folder holds no causal language model, or its weights do not fit its config.
            WholeModelNeededError: the weights are stored quantised, or are not tied as the model's are.
        """
        self._folder, self._device = folder, device
        self._model = _bare_model(folder, config, dtype)
        with WeightFiles(folder) as files:
            self._places = _places(self._model)
            self._origins, surplus = origins(self._model, files.names)
            self._check_surplus(surplus)
            self._check_tied(files)
            self._check_all_there()
            self._check_shapes(files)
        for places in self._places.values():
            if isinstance(parameter := _tensor(places), nn.Parameter):
                claim = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
                _put(places, nn.Parameter(claim))
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        install(self._model)
        return self._model

    def drop_memory(self) -> None:
        """Before the model is sharded: weights that ``fill`` will read need no memory until then."""
        for places in self._places.values():
            if isinstance(held := _tensor(places), nn.Parameter):
                empty = torch.empty(held.shape, dtype=held.dtype, device="meta")
                _put(places, nn.Parameter(empty, requires_grad=held.requires_grad))

    @torch.no_grad()
    def fill(self) -> None:
        """Reads this rank's share of every weight, and buffers whole.

        Raises:
            ModelError: weights are missing, or are of another shape than the config says.
        """
        with WeightFiles(self._folder) as files:
            for name, origin in self._origins.items():
                for made, tensor in self._read(files, name, origin):
                    self._fill(made, tensor)
        if left := [name for name, places in self._places.items() if _tensor(places).is_meta]:
            raise self._misfit(f"nothing for {left[0]}")

    def _read(self, files: WeightFiles, name: str, origin: Origin) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of a weight, or of all weights that one rule makes of the same tensors."""
        held = _tensor(self._places[name])
        if origin.is_stack and not len(local(held)):
            yield name, torch.empty(local(held).shape)  # no rule knows an empty stack
            return
        for made, tensor in origin.read(name, box(held), files.read, self._model).items():
            is_cut = origin.converter is None or origin.is_stack
            yield made, tensor if is_cut else tensor[box(_tensor(self._places[made]))]

    def _fill(self, name: str, tensor: Tensor) -> None:
        places = self._places[name]
        held = _tensor(places)
        if tensor.shape != local(held).shape:
            raise self._misfit(f"{name} has shape {list(tensor.shape)}", list(local(held).shape))
        # A copy in any case: what was read is a view of the file.
        copy = torch.empty(tensor.shape, dtype=held.dtype, device=self._device).copy_(tensor)
        if isinstance(held, nn.Parameter):
            _put(places, nn.Parameter(like(held, copy), requires_grad=held.requires_grad))
        else:
            _put(places, copy)

    def _check_tied(self, files: WeightFiles) -> None:
        """A weight that the checkpoint has twice must be the same both times."""
        for names in _by_identity(self._places).values():
            first, *others = [name for name in names if name in self._origins] or [""]
            for other in others:
                if not torch.equal(*(files.read(self._origins[name].parts[0][0]) for name in (first, other))):
                    raise WholeModelNeededError(f"{first} and {other} are tied by its config and differ in its files")
                del self._origins[other]

    def _check_surplus(self, surplus: list[str]) -> None:
        if odd := unknown(self._model, surplus):
            raise self._misfit(f"{len(odd)} that the model has no place for, such as {odd[0]}")

    def _check_all_there(self) -> None:
        have = {id(self._places[name]) for name in self._origins}
        # A rule that makes several weights is noted under the first; whether it makes the others is seen at the end.
        rules = [origin.converter for origin in self._origins.values() if origin.converter is not None]
        promised = [target for rule in rules for target in rule.target_patterns[1:]]
        lacking = [name for name, places in self._places.items() if id(places) not in have]
        if odd := [name for name in lacking if not any(target in name for target in promised)]:
            raise self._misfit(f"no {odd[0]}" + (f", and {len(odd) - 1} more are missing" if odd[1:] else ""))

    def _check_shapes(self, files: WeightFiles) -> None:
        for name, origin in self._origins.items():
            wanted = tuple(_tensor(self._places[name]).shape)
            if origin.converter is None and (got := files.shape(origin.parts[0][0])) != wanted:
                raise self._misfit(f"{name} has shape {list(got)}", list(wanted))
            # Told by every rank: the rank whose rows are lacking could not tell the others.
            if origin.is_stack and {len(names) for names in origin.by_pattern.values()} != {wanted[0]}:
                raise self._misfit(f"{name} is made of {len(origin.parts)} tensors", f"{wanted[0]} of each kind")

    def _misfit(self, got: str, expected: object = None) -> ModelError:
        return ModelError(
            f"The weights in {self._folder} do not fit its config ({type(self._model).__name__})",
            got=got,
            expected=expected,
        )


def _bare_model(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The model as ``from_pretrained`` makes it, with parameters on the meta device and true buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    code = {"trust_remote_code": config.trust_remote_code}
    try:
        hub_config = AutoConfig.from_pretrained(folder, **code)
        if getattr(hub_config, "quantization_config", None) is not None:
            raise WholeModelNeededError("its weights are stored quantised")
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(hub_config, dtype=dtype, **code)
        name = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
        made_up = {"_from_model_config": True} if name == "config.json" else {}
        model.generation_config = GenerationConfig.from_pretrained(folder, config_file_name=name, **made_up)
    except WholeModelNeededError:
        raise
    except Exception as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        # Routers' corrections, say, which bf16 would round away.
        if any(re.search(pattern, name) for pattern in getattr(model, "_keep_in_fp32_modules_strict", None) or ()):
            parameter.data = parameter.data.float()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a module's parameters keep their shapes alone, from the moment they become its own."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places(model: nn.Module) -> dict[str, list[Place]]:
    """Where each weight and each stored buffer stands, by its name in the state dict; tied ones share their list."""
    by_identity: dict[int, list[Place]] = {}
    found = {}
    for prefix, module in model.named_modules():
        stored = set(module._buffers) - module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *((name, module._buffers[name]) for name in sorted(stored))):
            if tensor is not None:
                places = by_identity.setdefault(id(tensor), [])
                places.append((module, name))
                found[f"{prefix}.{name}".removeprefix(".")] = places
    return found


def _by_identity(places: dict[str, list[Place]]) -> dict[int, list[str]]:
    """The names of each weight."""
    names: dict[int, list[str]] = {}
    for name, of_name in places.items():
        names.setdefault(id(of_name), []).append(name)
    return names


def _tensor(places: list[Place]) -> Tensor:
    module, name = places[0]
    tensor: Tensor = getattr(module, name)
    return tensor


def _put(places: list[Place], tensor: Tensor) -> None:
    for module, name in places:
        setattr(module, name, tensor)
