"""Chunked log-probs against PyTorch's log-softmax in fp64.

A: answer tokens, D: hidden size, V: vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_train.core.logprobs import CHUNK_TOKENS, LogitTransform, log_sum_squares, token_logprobs

A, D, V = 23, 8, 50


def _inputs(tokens: int = A, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_AD = torch.randn(tokens, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    bias_V = torch.randn(V, generator=generator)
    targets_A = torch.randint(0, V, (tokens,), generator=generator)
    upstream_A = torch.randn(tokens, generator=generator)
    return hidden_AD, weight_VD, bias_V, targets_A, upstream_A


def _fp64_logits(
    hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    logits_AV = hidden_AD @ weight_VD.T if bias_V is None else hidden_AD @ weight_VD.T + bias_V
    logits_AV = logits_AV * scale
    return logits_AV if cap is None else cap * torch.tanh(logits_AV / cap)


def _fp64(hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_A: Tensor, **transform: float) -> Tensor:
    logits_AV = _fp64_logits(hidden_AD, weight_VD, bias_V, **transform)
    return torch.log_softmax(logits_AV, dim=-1).gather(1, targets_A[:, None]).squeeze(1)


def _assert_close(got: Tensor, wanted: Tensor, relative: float = 1e-6) -> None:
    """Largest error relative to the largest number; all zeros are not close to anything but zeros."""
    assert got.shape == wanted.shape
    assert wanted.abs().max() > 1e-3
    assert (got.double() - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, A - 1, A, A + 1, CHUNK_TOKENS])
def test_values_and_gradients_equal_fp64_log_softmax(chunk_tokens: int, with_bias: bool) -> None:
    """Forward, and backward by hidden states, weight and bias, for chunks that do and do not divide the tokens."""
    hidden_AD, weight_VD, bias_V, targets_A, upstream_A = _inputs()
    leaves = [t.requires_grad_() for t in (hidden_AD, weight_VD, bias_V)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got_A = token_logprobs(
        leaves[0], leaves[1], targets_A, bias_V=leaves[2] if with_bias else None, chunk_tokens=chunk_tokens
    )
    wanted_A = _fp64(exact[0], exact[1], exact[2] if with_bias else None, targets_A)
    got_A.backward(upstream_A)
    wanted_A.backward(upstream_A.double())
    _assert_close(got_A, wanted_A)
    for leaf, reference in list(zip(leaves, exact, strict=True))[: 3 if with_bias else 2]:
        _assert_close(leaf.grad, reference.grad)


@pytest.mark.parametrize("transform", [{"cap": 2.0}, {"scale": 0.25}, {"scale": 0.5, "cap": 1.5}], ids=str)
@pytest.mark.parametrize("chunk_tokens", [7, CHUNK_TOKENS])
def test_capped_and_scaled_logits_equal_fp64(transform: dict[str, float], chunk_tokens: int) -> None:
    """Gemma 2 bends its logits, Cohere scales them: forward, and backward by all three inputs."""
    hidden_AD, weight_VD, bias_V, targets_A, upstream_A = _inputs()
    leaves = [t.requires_grad_() for t in (hidden_AD, weight_VD, bias_V)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got_A = token_logprobs(
        leaves[0], leaves[1], targets_A, bias_V=leaves[2], transform=LogitTransform(**transform),
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    wanted_A = _fp64(exact[0], exact[1], exact[2], targets_A, **transform)
    got_A.backward(upstream_A)
    wanted_A.backward(upstream_A.double())
    plain_A = _fp64(exact[0], exact[1], exact[2], targets_A)
    assert (plain_A - wanted_A).abs().max() > 0.1
    _assert_close(got_A, wanted_A)
    for leaf, reference in zip(leaves, exact, strict=True):
        _assert_close(leaf.grad, reference.grad)


@pytest.mark.parametrize("transform", [{}, {"scale": 0.5, "cap": 1.5}], ids=str)
def test_log_sum_of_squares_equals_fp64(transform: dict[str, float]) -> None:
    """log of the sum over the vocabulary of p squared, for chunks that do not divide the tokens; no gradient."""
    hidden_AD, weight_VD, bias_V, _, _ = _inputs()
    wanted_A = torch.softmax(
        _fp64_logits(hidden_AD.double(), weight_VD.double(), bias_V.double(), **transform), dim=-1
    ).square().sum(-1).log()  # fmt: skip
    got_A = log_sum_squares(
        hidden_AD.requires_grad_(), weight_VD, bias_V=bias_V, transform=LogitTransform(**transform), chunk_tokens=7
    )
    _assert_close(got_A, wanted_A)
    assert not got_A.requires_grad


@pytest.mark.slow
def test_compiled_path_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs run, compiled for this CPU: the same numbers, for chunks of two sizes and a cap."""
    from dpo_train.core import logprobs

    def run() -> list[Tensor]:
        hidden_AD, weight_VD, bias_V, targets_A, upstream_A = _inputs()
        leaves = [t.requires_grad_() for t in (hidden_AD, weight_VD, bias_V)]
        got_A = token_logprobs(
            leaves[0], leaves[1], targets_A, bias_V=leaves[2], transform=LogitTransform(cap=2.0), chunk_tokens=16
        )
        got_A.backward(upstream_A)
        return [got_A.detach(), *(leaf.grad for leaf in leaves)]

    plain = run()
    used = []
    monkeypatch.setattr(logprobs, "_on", lambda _, function: used.append(function) or logprobs.compiled(function))
    for got, wanted in zip(run(), plain, strict=True):
        _assert_close(got, wanted.double())
    assert len(used) == 2


def test_value_is_what_a_hand_computes() -> None:
    """Logits 0 and ln 3 give probabilities 1/4 and 3/4."""
    hidden_AD = torch.tensor([[1.0], [1.0]])
    weight_VD = torch.log(torch.tensor([[1.0], [3.0]]))
    logps_A = token_logprobs(hidden_AD, weight_VD, torch.tensor([0, 1]))
    assert logps_A.exp().tolist() == pytest.approx([0.25, 0.75], rel=1e-6)


def test_gradients_of_a_tied_weight_add_up() -> None:
    """A weight that both embeds the input and predicts the output gets the sum of both gradients."""
    _, weight_VD, _, targets_A, upstream_A = _inputs()
    inputs_A = targets_A.roll(1)
    weight_VD.requires_grad_()
    exact_VD = weight_VD.detach().double().requires_grad_()
    token_logprobs(torch.tanh(weight_VD[inputs_A]), weight_VD, targets_A, chunk_tokens=4).backward(upstream_A)
    _fp64(torch.tanh(exact_VD[inputs_A]), exact_VD, None, targets_A).backward(upstream_A.double())
    _assert_close(weight_VD.grad, exact_VD.grad)


def test_frozen_weight_gets_no_gradient() -> None:
    """Under LoRA only the hidden states want one; it is the same as if all did."""
    hidden_AD, weight_VD, _, targets_A, upstream_A = _inputs()
    exact_AD = hidden_AD.double().requires_grad_()
    hidden_AD.requires_grad_()
    token_logprobs(hidden_AD, weight_VD, targets_A, chunk_tokens=5).backward(upstream_A)
    _fp64(exact_AD, weight_VD.double(), None, targets_A).backward(upstream_A.double())
    assert weight_VD.grad is None
    _assert_close(hidden_AD.grad, exact_AD.grad)


def test_logits_far_from_zero_do_not_overflow() -> None:
    """Logits of 1,000 and 990: exp overflows in fp32, the log-probs are -ln(1 + e^-10) and 10 less.

    fp32 resolves 1,000 to 6e-5.
    """
    logps_A = token_logprobs(torch.ones(2, 1), torch.tensor([[1000.0], [990.0]]), torch.tensor([0, 1]))
    assert logps_A.tolist() == pytest.approx([-4.5398899e-05, -10.000045], abs=1e-4)


def test_bf16_weight_gradient_keeps_small_contributions_of_late_chunks() -> None:
    """2,048 equal tokens in chunks of 1: a bf16 sum would stop growing at 256 times the first term.

    Two words of equal logits: each token adds (1 - 1/2) to the weight of its target, so the sum is 1,024.
    """
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden_AD = torch.ones(2048, 1, dtype=torch.bfloat16)
    token_logprobs(hidden_AD, weight_VD, torch.zeros(2048, dtype=torch.int64), chunk_tokens=1).sum().backward()
    assert weight_VD.grad.flatten().tolist() == [1024.0, -1024.0]


def test_no_tensor_grows_with_tokens_times_vocabulary() -> None:
    """Neither forward nor backward makes a tensor larger than chunk x V, inputs' sizes aside."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden_AD, weight_VD, bias_V, targets_A, upstream_A = _inputs(tokens=200)
    leaves = [t.requires_grad_() for t in (hidden_AD, weight_VD, bias_V)]
    with Watch():
        token_logprobs(leaves[0], leaves[1], targets_A, bias_V=leaves[2], chunk_tokens=32).backward(upstream_A)
    assert 32 * V <= largest <= max(32 * V, 200 * D, V * D)
