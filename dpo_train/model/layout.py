"""What a model asks of packed rows: which masks its layers take, and how it makes logits of hidden states.

Masks of ours replace a model's own, so whatever its own mask would say besides "causal" must be known here. A model
of which that is not known is refused by name; what this file cannot see, ``score.check_layout`` finds by numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_train.core.attention import additive, shared_prompt_mask
from dpo_train.core.logprobs import LogitTransform
from dpo_train.errors import ModelError
from dpo_train.model.attention import NAME, block_mask, lengths_table
from dpo_train.model.rows import Row

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: each token goes to the ``top_k`` experts that its router prefers."""

    num_experts: int
    top_k: int
    aux_loss_coef: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model reads rows."""

    window: int | None
    """Positions that a sliding layer sees."""
    by_layer_type: bool
    """Layers differ, and the decoder takes a mask for each type."""
    own_attention: bool
    """It keeps an attention of its own (eager), which adds dense masks to scores."""
    transform: LogitTransform
    experts: Experts | None

    def masks(self, row: Row) -> Any:
        """What the decoder takes as ``attention_mask``: a mask, or one for each type of layer."""
        if self.by_layer_type:
            return {FULL: self._mask(row, None), SLIDING: self._mask(row, self.window)}
        return self._mask(row, self.window)

    def _mask(self, row: Row, window: int | None) -> Any:
        if self.own_attention:
            mask = shared_prompt_mask(row.pair_T, row.part_T, row.positions_T, window=window)
            return additive(mask, torch.float32)
        return block_mask(row, window) if row.pair_T.device.type == "cuda" else lengths_table(row, window)


def layout_of(model: Any, folder: Path) -> Layout:
    """The layout of a causal language model.

    Raises:
        ModelError: its layers do something that a mask of ours would take away.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - {FULL, SLIDING}:
        _refuse(model, folder, f"layers of type {', '.join(sorted(unknown))}")
    for name in ("attention_chunk_size", "attention_types"):
        if getattr(config, name, None):
            _refuse(model, folder, f"{name} in its config")
    uses_window = getattr(config, "use_sliding_window", True) and (not layer_types or SLIDING in layer_types)
    window = getattr(config, "sliding_window", None) if uses_window else None
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return Layout(
        window=window,
        by_layer_type=window is not None and bool(layer_types),
        own_attention=config._attn_implementation != NAME,
        transform=LogitTransform(scale=scale / (getattr(config, "logits_scaling", None) or 1.0), cap=cap),
        experts=_experts(config),
    )


def _experts(config: Any) -> Experts | None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if not count or not top_k or getattr(config, "router_aux_loss_coef", None) is None:
        return None
    return Experts(num_experts=count, top_k=top_k, aux_loss_coef=config.router_aux_loss_coef)


def _refuse(model: Any, folder: Path, what: str) -> None:
    raise ModelError(
        f"The model in {folder} ({type(model).__name__}) cannot be trained in packed rows",
        got=what,
        expected="full or sliding-window attention, as in Llama, Qwen 2 and 3, Mistral, Mixtral, Gemma 2 and 3, Phi-3, "
        "OLMo 2, SmolLM, GPT-2 or GPT-NeoX",
    )
