"""Hidden states and the vocabulary matrix to log-probs of given tokens, without ever holding [tokens, vocabulary].

A: answer tokens, D: hidden size, V: vocabulary, C: tokens of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""At a vocabulary of 128k, 256 rows of fp32 logits are 131 MB: large enough to keep the matrix product busy."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to ``hidden @ weight.T + bias``: cap * tanh(scale * z / cap); Gemma 2 caps, Cohere scales."""

    scale: float = 1.0
    cap: float | None = None


IDENTITY = LogitTransform()


def token_logprobs(
    hidden_AD: Tensor,
    weight_VD: Tensor,
    targets_A: Tensor,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """log softmax(logits)[target] for every answer token, in fp32.

    Forward keeps only the log-normaliser of each token; backward computes each chunk's logits again. Memory is
    chunk_tokens x V whatever the number of tokens. On GPUs what follows the matrix product is compiled into one kernel.

    Args:
        hidden_AD: float [A, D], the states that predict the targets.
        weight_VD: float [V, D], the output embedding; tied or not.
        targets_A: int64 [A].
        bias_V: float [V].
        transform: from the product to the logits.

    Returns:
        float32 [A].
    """
    weight_VD = _as_computed(hidden_AD, weight_VD)
    return _TokenLogprobs.apply(hidden_AD, weight_VD, bias_V, targets_A, transform, chunk_tokens)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def log_sum_squares(
    hidden_AD: Tensor,
    weight_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """log of the sum over the vocabulary of p^2, at every answer token: float32 [A], without gradient.

    The log of the mean of p over tokens that p itself draws, which WPO compares a token's log-prob with
    (arXiv 2406.11827, section 3.2).
    """
    weight_VD = _as_computed(hidden_AD, weight_VD)
    found = []
    for hidden_CD in torch.split(hidden_AD, chunk_tokens):
        logits_CV = _transformed(_product(hidden_CD, weight_VD), bias_V, transform)
        found.append(torch.logsumexp(2 * logits_CV, dim=-1) - 2 * torch.logsumexp(logits_CV, dim=-1))
    return torch.cat(found) if found else hidden_AD.new_empty(0, dtype=torch.float32)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_A: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
    ) -> Tensor:
        values = _on(hidden_AD.device, _values)
        logprobs_A = torch.empty(len(targets_A), dtype=torch.float32, device=hidden_AD.device)
        normaliser_A = torch.empty_like(logprobs_A)
        for start in range(0, len(targets_A), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            product_CV = _product(hidden_AD[chunk], weight_VD)
            logprobs_A[chunk], normaliser_A[chunk] = values(product_CV, bias_V, targets_A[chunk], transform)
        ctx.save_for_backward(hidden_AD, weight_VD, bias_V, targets_A, normaliser_A)
        ctx.transform, ctx.chunk_tokens = transform, chunk_tokens
        return logprobs_A

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_A,) = gradients
        hidden_AD, weight_VD, bias_V, targets_A, normaliser_A = ctx.saved_tensors
        slopes = _on(hidden_AD.device, _slopes)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_AD = torch.empty_like(hidden_AD) if needs_hidden else None
        # Sums over chunks are kept in fp32: bf16 would drop the small contributions of late chunks.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(targets_A), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            product_CV = _product(hidden_AD[chunk], weight_VD)
            grad_CV = slopes(product_CV, bias_V, targets_A[chunk], normaliser_A[chunk], grad_A[chunk], ctx.transform)
            if grad_hidden_AD is not None:
                grad_hidden_AD[chunk] = grad_CV.to(weight_VD.dtype) @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_AD[chunk].float()
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        return (
            grad_hidden_AD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
            None,
        )


def _as_computed(hidden_AD: Tensor, weight_VD: Tensor) -> Tensor:
    # Cast once, and outside: backward runs without autocast and must see the numbers of the forward pass.
    device = hidden_AD.device.type
    return weight_VD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight_VD


def _product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_CD.to(weight_VD.dtype) @ weight_VD.T


def _transformed(product_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    logits_CV = product_CV.float()
    if bias_V is not None:
        logits_CV = logits_CV + bias_V.float()
    if transform.scale != 1.0:
        logits_CV = logits_CV * transform.scale
    return logits_CV if transform.cap is None else transform.cap * torch.tanh(logits_CV / transform.cap)


def _values(
    product_CV: Tensor, bias_V: Tensor | None, targets_C: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and log-normalisers, float32 [C] each."""
    logits_CV = _transformed(product_CV, bias_V, transform)
    normaliser_C = torch.logsumexp(logits_CV, dim=-1)
    return logits_CV.gather(1, targets_C[:, None]).squeeze(1) - normaliser_C, normaliser_C


def _slopes(
    product_CV: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    normaliser_C: Tensor,
    grad_C: Tensor,
    transform: LogitTransform,
) -> Tensor:
    """Gradient by product + bias, float32 [C, V]: d log p(target) / d logits = one_hot(target) - softmax."""
    logits_CV = _transformed(product_CV, bias_V, transform)
    grad_CV = torch.exp(logits_CV - normaliser_C[:, None]).mul_(-grad_C[:, None])
    grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
    if transform.cap is not None:
        grad_CV.mul_(1 - (logits_CV / transform.cap) ** 2)
    return grad_CV if transform.scale == 1.0 else grad_CV.mul_(transform.scale)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where that pays: on a CPU the matrix product is nearly all of the work."""
    return compiled(function) if device.type == "cuda" else function


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for any number of tokens."""
    return torch.compile(function, dynamic=True)
