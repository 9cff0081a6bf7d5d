"""A policy's forward over a packed row, as a module, so that FSDP2 can gather its weights around it.

T: tokens of a row, A: answer tokens of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_train.core.logprobs import log_sum_squares, token_logprobs
from dpo_train.core.router import RouterSums, router_sums
from dpo_train.model.layout import Layout
from dpo_train.model.rows import Row


class RowLogps(NamedTuple):
    """What the policy says about a row's answer tokens, all of them on its device."""

    token_logps_A: Tensor
    log_sum_squares_A: Tensor | None
    """log of the sum of p^2 over the vocabulary, if it was asked for."""
    router: RouterSums | None
    """How the row's tokens chose their experts, if it was asked for."""


class PackedForward(nn.Module):
    """Decoder and vocabulary matrix over one row, logits never stored."""

    def __init__(self, model: Any, layout: Layout, device: torch.device, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._layout, self._device, self._bf16 = layout, device, bf16
        self.static_tokens: int | None = None
        """Rows are padded to multiples of this, for layers that are compiled."""

    def forward(self, row: Row, *, with_squares: bool, with_router: bool) -> RowLogps:
        layout, head = self._layout, self.model.get_output_embeddings()
        num_tokens = len(row.input_ids_T)
        row = row if self.static_tokens is None else row.padded(self.static_tokens)
        experts = layout.experts if with_router else None
        # Each weight is used once a row: kept, its bf16 copy would outlive its use, whole on every rank under FSDP2.
        with autocast(self._device, self._bf16, keep_casts=False):
            outputs = self.model.get_decoder()(
                input_ids=row.input_ids_T[None],
                position_ids=row.positions_T[None],
                attention_mask=layout.masks(row),
                use_cache=False,
                **({"output_router_logits": True} if experts else {}),
            )
            hidden_AD = outputs.last_hidden_state[0][row.source_A]
            logits: dict[str, Any] = {"bias_V": head.bias, "transform": layout.transform}
            token_logps_A = token_logprobs(hidden_AD, head.weight, row.target_A, **logits)
            squares_A = log_sum_squares(hidden_AD, head.weight, **logits) if with_squares else None
        # Padding chooses experts as well, and is nobody's token.
        router = router_sums([each[:num_tokens] for each in outputs.router_logits], experts.top_k) if experts else None
        return RowLogps(token_logps_A, squares_A, router)


def autocast(device: torch.device, bf16: bool, *, keep_casts: bool = True) -> AbstractContextManager[Any]:
    """Computes matrix products and attention in bf16, if so wanted; else everything in the weights' dtype, fp32.

    Args:
        keep_casts: bf16 copies of fp32 weights stay until the end, for weights that are used many times.
    """
    if not bf16:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=keep_casts)
