"""A model's weights by what they are: who computes with them, who trains them, who holds which share.

Everything is counted, from shapes on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dpo_train.config import LoraConfig
from dpo_train.errors import ModelError
from dpo_train.model.adapters import fresh_adapter, modules_named
from dpo_train.model.outline import meta_model, text_config

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""4.127 bits: NF4, an 8-bit scale for 64 weights, an fp32 scale for 256 of those (arXiv 2305.14314, section 3)."""

MOST_UNLIKE = 4
"""Layers without experts that a mixture may begin with: all of them are traced."""

Stored = Literal["fp32", "bf16", "nf4", "nf4, fp32"]
"""Of NF4, what is not quantised is stored in what is computed in: bf16, or fp32."""


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
        if stored.startswith("nf4") and self.is_linear:
            return self.numel * NF4_BITS / 8
        size = 4 if stored.endswith("fp32") else 2
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
    num_experts: int = 0
    """Of a layer, of which a token meets ``top_k``; 0: it is no mixture."""
    top_k: int = 0
    aux_loss_coef: float = 0.0
    """Weight of the loss that keeps a mixture balanced, by the model's config."""
    num_unlike: int = 0
    """Layers at the beginning that are not like the last one, as a mixture's that have no experts."""

    @property
    def total(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def active(self) -> int:
        """Weights that a token meets, the embeddings as a whole: what makers of mixtures publish."""
        return self.total - self._unmet

    @property
    def linear(self) -> int:
        """Weights that a token meets in the layers' matrices."""
        in_layers = (w for w in self.weights if w.layer is not None and not w.name.endswith("bias"))
        return sum(w.numel for w in in_layers if len(w.shape) > 1) - self._unmet

    @property
    def met_experts(self) -> int:
        """Weights of experts that a token meets."""
        return self._experts * self.top_k // max(1, self.num_experts)

    @property
    def _unmet(self) -> int:
        return self._experts - self.met_experts

    @property
    def _experts(self) -> int:
        return sum(w.numel for w in self.weights if _is_expert(w)) if self.num_experts else 0

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
        ModelError: it is no causal language model, or ``frozen`` names no module of it; or a mixture of experts that
            cannot be planned.
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
    head_size = _key_size(text)
    num_experts, top_k = _experts(weights, text)
    return Sizes(
        kind=str(text.model_type),
        weights=weights,
        num_layers=1 + max((number for number in layers.values()), default=-1),
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0],
        attention_width=heads * head_size,
        key_value_width=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        num_experts=num_experts,
        top_k=top_k,
        aux_loss_coef=(getattr(text, "router_aux_loss_coef", None) or 0.0) if num_experts else 0.0,
        num_unlike=_num_unlike(weights) if num_experts else 0,
    )


def placed_adapters(config: Any, lora: LoraConfig, *, trust_remote_code: bool = False) -> tuple[Weight, ...]:
    """Adapters where PEFT itself puts them, which in a mixture of experts depends on its kind.

    Routers and experts have them or have none; experts as many times the rank as there are in a layer.
    """
    model = meta_model(config, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        fresh_adapter(model, lora, 0)
    layers = _layer_of(model)
    return tuple(
        Weight(name=name, shape=tuple(p.shape), layer=layers.get(id(p)), is_linear=False, is_multiplied=True)
        for name, p in model.named_parameters()
        if "lora_" in name
    )


def adapters_of(sizes: Sizes, lora: LoraConfig) -> tuple[Weight, ...]:
    """Both factors of every adapter of a model without experts: rank x inputs and outputs x rank."""
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
    """Experts of a layer are one tensor."""
    return weight.layer is not None and len(weight.shape) == 3 and ".experts." in weight.name


def _experts(weights: Iterable[Weight], text: Any) -> tuple[int, int]:
    """How many a layer has, and how many of them a token meets; 0 without.

    Raises:
        ModelError: neither weights nor config say it; or its values have another size than its keys.
    """
    num_experts = max((w.shape[0] for w in weights if _is_expert(w)), default=0)
    if not num_experts:
        if (getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0) > 1:
            raise ModelError(
                f"A mixture of the kind {text.model_type} cannot be planned: where its experts are is not known here",
                expected="a layer's experts stacked in tensors named `experts`",
            )
        return 0, 0
    keys, values = _key_size(text), getattr(text, "v_head_dim", None) or _key_size(text)
    if keys != values:
        raise ModelError(
            f"A mixture of the kind {text.model_type} cannot be planned: this engine's attention takes values as wide "
            "as keys",
            got=f"keys of {keys}, values of {values}",
        )
    top_k = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_k", None)
    if not top_k:
        raise ModelError(
            f"A mixture of the kind {text.model_type} cannot be planned: its config does not say how many experts a "
            "token meets",
            expected="num_experts_per_tok",
        )
    return num_experts, int(top_k)


def _key_size(text: Any) -> int:
    """Of a head; DeepSeek's keys have two parts, and its ``head_dim`` is one of them."""
    parts: list[int] = [getattr(text, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope")]
    if all(parts):
        return sum(parts)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _num_unlike(weights: Iterable[Weight]) -> int:
    """Layers before all that are alike.

    Raises:
        ModelError: layers of several kinds take turns, so that no traced ones stand for the others.
    """
    of_layers: dict[int, list[tuple[int, ...]]] = {}
    for weight in weights:
        if weight.layer is not None:
            of_layers.setdefault(weight.layer, []).append(weight.shape)
    last = max(of_layers)
    first = next(n for n in sorted(of_layers) if all(of_layers[m] == of_layers[last] for m in range(n, last + 1)))
    if first > MOST_UNLIKE:
        raise ModelError(
            "A mixture whose layers with and without experts take turns cannot be planned",
            got=f"layer {first} of {last + 1} is the first from which on all are alike",
        )
    return first


def _layer_of(model: Any) -> dict[int, int]:
    """Of each parameter in a layer that layer's number."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = [module for module in model.modules() if type(module).__name__ in names]
    return {id(p): number for number, layer in enumerate(found) for p in layer.parameters()}
