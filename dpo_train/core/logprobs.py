"""Hidden states and the vocabulary matrix to log-probs of given tokens, without ever holding [tokens, vocabulary].

A: answer tokens, D: hidden size, V: vocabulary, C: tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""At a vocabulary of 128k, 256 rows of fp32 logits are 131 MB: large enough to keep the matrix product busy."""


def token_logprobs(
    hidden_AD: Tensor,
    weight_VD: Tensor,
    targets_A: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] for every answer token, in fp32.

    Forward keeps only the log-normaliser of each token; backward computes each chunk's logits again. Memory is
    chunk_tokens x V whatever the number of tokens.

    Args:
        hidden_AD: float [A, D], the states that predict the targets.
        weight_VD: float [V, D], the output embedding; tied or not.
        targets_A: int64 [A].

    Returns:
        float32 [A].
    """
    # Cast once, and outside: backward runs without autocast and must see the numbers of the forward pass.
    device = hidden_AD.device.type
    if torch.is_autocast_enabled(device):
        weight_VD = weight_VD.to(torch.get_autocast_dtype(device))
    return _TokenLogprobs.apply(hidden_AD, weight_VD, bias_V, targets_A, chunk_tokens)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_A: Tensor, chunk_tokens: int
    ) -> Tensor:
        logprobs_A = torch.empty(len(targets_A), dtype=torch.float32, device=hidden_AD.device)
        normaliser_A = torch.empty_like(logprobs_A)
        for start in range(0, len(targets_A), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = _logits(hidden_AD[chunk], weight_VD, bias_V)
            normaliser_A[chunk] = torch.logsumexp(logits_CV, dim=-1)
            target_logits_C = logits_CV.gather(1, targets_A[chunk, None]).squeeze(1)
            logprobs_A[chunk] = target_logits_C - normaliser_A[chunk]
        ctx.save_for_backward(hidden_AD, weight_VD, bias_V, targets_A, normaliser_A)
        ctx.chunk_tokens = chunk_tokens
        return logprobs_A

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_A,) = gradients
        hidden_AD, weight_VD, bias_V, targets_A, normaliser_A = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_AD = torch.empty_like(hidden_AD) if needs_hidden else None
        # Sums over chunks are kept in fp32: bf16 would drop the small contributions of late chunks.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(targets_A), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logits_CV = _logits(hidden_AD[chunk], weight_VD, bias_V)
            # d log p(target) / d logits = one_hot(target) - softmax
            grad_logits_CV = torch.exp(logits_CV - normaliser_A[chunk, None]).mul_(-grad_A[chunk, None])
            grad_logits_CV.scatter_add_(1, targets_A[chunk, None], grad_A[chunk, None])
            if grad_hidden_AD is not None:
                grad_hidden_AD[chunk] = grad_logits_CV.to(weight_VD.dtype) @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits_CV.T @ hidden_AD[chunk].float()
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(0)
        return (
            grad_hidden_AD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_CV = (hidden_CD.to(weight_VD.dtype) @ weight_VD.T).float()
    return logits_CV if bias_V is None else logits_CV + bias_V.float()
