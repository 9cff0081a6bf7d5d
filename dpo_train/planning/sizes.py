"""A model's weights by what they are: who computes with them, who trains them, who holds which share.

Everything is counted, from shapes on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dpo_train.config import LoraConfig
from dpo_train.model.adapters import modules_named
from dpo_train.model.outline import meta_model, text_config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""4.127 bits: NF4, an 8-bit scale for 64 weights, an fp32 scale for 256 of those (arXiv 2305.14314, section 3)."""

Stored = Literal["fp32", "bf16", "nf4"]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """Number of its layer, from 0; None: embeddings, the last norm, the vocabulary matrix."""
    is_linear: bool
    """Of a linear module other than the vocabulary matrix: what adapters stand on and NF4 replaces."""
    is_multiplied: bool
    """Some matrix product reads it, which autocast gives a bf16 copy."""
    is_held: bool = False
    """``train.frozen`` names it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes_on(self, num_ranks: int, stored: Stored) -> float:
        """Of the rank that holds most: FSDP2 cuts the first dimension, and pads every share to the largest."""
        if stored == "nf4" and self.is_linear:
            return self.numel * NF4_BITS / 8
        size = 4 if stored == "fp32" else 2
        return float(math.ceil(self.shape[0] / num_ranks) * math.prod(self.shape[1:]) * size)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model."""

    kind: str
    weights: tuple[Weight, ...]
    num_layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    """Heads x their size: what a query's scores and sums cost."""
    key_value_width: int
    """The same of keys, or values."""
    active: float
    """Share of the weights of a mixture's experts that a token meets; 1 without experts."""

    @property
    def total(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def linear(self) -> int:
        """Weights that a token meets in the layers' matrices."""
        experts = sum(w.numel for w in self.weights if _is_expert(w))
        matrices = sum(w.numel for w in self.weights if w.layer is not None and len(w.shape) == 2)
        return round(matrices + self.active * experts)

    def bytes_on(self, num_ranks: int, stored: Stored) -> float:
        """Of all weights, on the rank that holds most."""
        return sum(weight.bytes_on(num_ranks, stored) for weight in self.weights)

    @property
    def trained(self) -> tuple[Weight, ...]:
        """What full training trains."""
        return tuple(weight for weight in self.weights if not weight.is_held)


def sizes_of(config: Any, *, frozen: Iterable[str] = (), trust_remote_code: bool = False) -> Sizes:
    """The sizes of a model from its config.

    Raises:
        ModelError: it is no causal language model, or ``frozen`` names no module of it.
    """
    model, text = meta_model(config, trust_remote_code=trust_remote_code), text_config(config)
    held = {id(p) for m in modules_named(model, list(frozen), "frozen").values() for p in m.parameters()}
    layers = _layer_of(model)
    head = model.get_output_embeddings()
    linear = {id(m.weight) for m in model.modules() if m is not head and type(m).__name__ in {"Linear", "Conv1D"}} - {
        id(head.weight)
    }
    weights = tuple(
        Weight(
            name=name,
            shape=tuple(p.shape),
            layer=layers.get(id(p)),
            is_linear=id(p) in linear,
            is_multiplied=id(p) in linear or p is head.weight or p.ndim == 3,
            is_held=id(p) in held,
        )
        for name, p in model.named_parameters()
    )
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    return Sizes(
        kind=str(text.model_type),
        weights=weights,
        num_layers=1 + max((number for number in layers.values()), default=-1),
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0],
        attention_width=heads * head_size,
        key_value_width=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        active=text.num_experts_per_tok / experts if experts else 1.0,
    )


def adapters_of(sizes: Sizes, lora: LoraConfig) -> tuple[Weight, ...]:
    """Both factors of every adapter: rank x inputs and outputs x rank."""
    found = []
    for weight in sizes.weights:
        module = weight.name.rpartition(".")[0]
        is_meant = lora.target_modules == "all-linear" or any(
            module == target or module.endswith(f".{target}") for target in lora.target_modules
        )
        if weight.is_linear and is_meant and weight.name.endswith("weight"):
            outputs, inputs = weight.shape
            for side, shape in (("A", (lora.rank, inputs)), ("B", (outputs, lora.rank))):
                found.append(
                    Weight(
                        name=f"{module}.lora_{side}", shape=shape, layer=weight.layer, is_linear=False,
                        is_multiplied=True,
                    )
                )  # fmt: skip
    return tuple(found)


def _is_expert(weight: Weight) -> bool:
    return weight.layer is not None and len(weight.shape) == 3


def _layer_of(model: Any) -> dict[int, int]:
    """Of each parameter in a layer that layer's number."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = [module for module in model.modules() if type(module).__name__ in names]
    return {id(p): number for number, layer in enumerate(found) for p in layer.parameters()}
