"""One attention for packed rows and for everything else that a model computes, under a name of its own in transformers.

Which one runs is told by the mask that reaches it:

    int64 [1, 1, P, 2 + K]   lengths of the row's pairs (``lengths_table``): pair by pair, on CPUs
    BlockMask                blocks of the row that are visible at all: FlexAttention, on GPUs
    anything else            the model's own masks: generation, plain sequences

A mask is an argument of every layer, so what it says is still there when a layer's forward is computed again during
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dpo_train.core.attention import attend, pair_attention, visible
from dpo_train.model.rows import Row

NAME = "dpo_packed"


def install(model: Any) -> None:
    """Makes the model use it, unless it has an attention that only it knows (sinks, say), which then stays.

    Soft-capping transformers leaves to its slowest attention; ours knows it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" or getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation(NAME)


def lengths_table(row: Row, window: int | None) -> Tensor:
    """int64 [1, 1, P, 2 + K]: of each pair the window (0: none), the tokens of its prompt, and of each answer.

    P and K may differ from row to row without a compiled layer being compiled again.
    """
    lengths = torch.cat([row.prompt_lengths_P[:, None], row.lengths_PK], dim=1)
    table = torch.nn.functional.pad(lengths, (1, 0), value=window or 0)[None, None]
    torch._dynamo.maybe_mark_dynamic(table, [2, 3])
    return table


def block_mask(row: Row, window: int | None) -> BlockMask:
    """Which blocks of 128 queries and 128 keys hold anything visible, and the rule within them."""
    sees = visible(row.pair_T, row.part_T, row.positions_T, window=window)
    device = row.pair_T.device
    size = len(row.pair_T)
    # Compiled it never holds [T, T]. On CPUs, where only tests come by, it is small.
    return create_block_mask(
        lambda batch, head, query, key: sees(query, key), None, None, size, size, device=device.type,
        _compile=device.type == "cuda",
    )  # fmt: skip


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: [batch, heads, tokens, size] to [batch, tokens, heads, size]."""
    if isinstance(attention_mask, BlockMask):
        return _blockwise(module, query, key, value, attention_mask, scaling, softcap)
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return _pairwise(query, key, value, attention_mask, scaling, softcap), None
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)  # type: ignore[no-any-return]
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    mask = _causal(query, key) if attention_mask is None else attention_mask
    return attend(query, key, value, mask, scale=scaling, softcap=softcap).transpose(1, 2), None


# Its loop is over pairs, of which every row has others: nothing in it is to be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pairwise(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    rows = table[0, 0].tolist()
    window, lengths = rows[0][0] or None, [row[1:] for row in rows]
    found = pair_attention(query, key, value, lengths, window=window, scale=scaling, softcap=softcap)
    return found.transpose(1, 2).contiguous()


def _blockwise(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, None]:
    from transformers.integrations.flex_attention import flex_attention_forward

    # Rotary embeddings leave queries and keys in fp32 beside values in bf16, which the kernel does not take.
    query, key = (x.to(value.dtype) for x in (query, key))
    found = flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)
    return found[0], None


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """bool [1, 1, queries, keys]; the queries are the last of the keys' places."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
