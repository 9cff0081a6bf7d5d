"""The attention of rows in which two answers share a prompt: the rule, and the attention per pair that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dpo_train.core.attention import CHOSEN, PROMPT, REJECTED, additive, attend, pair_attention, shared_prompt_mask

_ONE_PAIR_AND_PADDING = shared_prompt_mask(
    torch.tensor([0, 0, 0, -1]), torch.tensor([PROMPT, CHOSEN, REJECTED, PROMPT]), torch.tensor([0, 1, 1, 0])
)


def _mask(pairs: list[int], parts: list[int]) -> list[str]:
    """One line per query: x where it sees the key."""
    mask = shared_prompt_mask(torch.tensor(pairs), torch.tensor(parts), torch.arange(len(pairs)))
    assert mask.shape == (1, 1, len(pairs), len(pairs))
    assert mask.dtype == torch.bool
    return ["".join("x" if seen else "." for seen in query) for query in mask[0, 0].tolist()]


def test_rejected_answer_sees_the_prompt_and_itself_but_not_the_chosen() -> None:
    """Prompt of 2, chosen of 2, rejected of 3, drawn out."""
    assert _mask([0] * 7, [PROMPT] * 2 + [CHOSEN] * 2 + [REJECTED] * 3) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        "xx..xx.",
        "xx..xxx",
    ]


def test_further_answers_of_a_ranking_see_the_prompt_and_themselves() -> None:
    """Prompt of 1, four answers of 1 or 2 tokens."""
    assert _mask([0] * 6, [PROMPT, CHOSEN, REJECTED, 3, 3, 4]) == [
        "x.....",
        "xx....",
        "x.x...",
        "x..x..",
        "x..xx.",
        "x....x",
    ]


def test_pairs_of_a_row_do_not_see_each_other() -> None:
    """Two pairs of one token each part: two blocks on the diagonal."""
    assert _mask([0, 0, 0, 1, 1, 1], [PROMPT, CHOSEN, REJECTED] * 2) == [
        "x.....",
        "xx....",
        "x.x...",
        "...x..",
        "...xx.",
        "...x.x",
    ]


def test_padding_sees_only_itself_and_is_seen_by_nobody() -> None:
    """A query without any key would be NaN after the softmax."""
    assert _mask([0, 0, 0, -1, -1], [PROMPT, CHOSEN, REJECTED, PROMPT, PROMPT]) == [
        "x....",
        "xx...",
        "x.x..",
        "...x.",
        "....x",
    ]


def test_attention_over_a_row_is_finite() -> None:
    """No query's softmax is over nothing, padding included."""
    mask = _ONE_PAIR_AND_PADDING
    states = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    out = torch.nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=mask)
    assert torch.isfinite(out).all()
    assert torch.allclose(out[0, 0, 3], states[0, 0, 3])


def test_window_counts_positions_and_not_places() -> None:
    """A window of 2 over prompt 2, chosen 2, rejected 2: the rejected answer's first token sees the prompt's last.

    In places it stands 3 behind it; in its own sequence it comes right after.
    """
    pairs, parts, positions = [0] * 6, [PROMPT] * 2 + [CHOSEN] * 2 + [REJECTED] * 2, [0, 1, 2, 3, 2, 3]
    mask = shared_prompt_mask(torch.tensor(pairs), torch.tensor(parts), torch.tensor(positions), window=2)
    assert ["".join("x" if seen else "." for seen in query) for query in mask[0, 0].tolist()] == [
        "x.....",
        "xx....",
        ".xx...",
        "..xx..",
        ".x..x.",
        "....xx",
    ]


def test_additive_mask_gives_the_same_attention() -> None:
    """0 where seen, the lowest number elsewhere: a softmax over the sum equals one over the seen keys."""
    mask = _ONE_PAIR_AND_PADDING
    scores = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    added = torch.softmax(scores + additive(mask, torch.float32), dim=-1)
    assert torch.allclose(added, torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1))


def _forward_flops(query: Any, key: Any, value: Any, *args: Any, **more: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# torch counts the kernels of GPUs alone.
CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


def _row(lengths: list[list[int]], padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pair, part and position of each token."""
    tokens = [
        (pair, part, place + (0 if part == PROMPT else sizes[0]))
        for pair, sizes in enumerate(lengths)
        for part, size in enumerate(sizes)
        for place in range(size)
    ]
    pair_T, part_T, positions_T = torch.tensor([*tokens, *[(-1, PROMPT, 0)] * padding]).unbind(1)
    return pair_T, part_T, positions_T


def _states(num_tokens: int, heads: tuple[int, int] = (4, 2)) -> list[Tensor]:
    """Queries, keys and values of 8 numbers a head; two queries share a key."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads[0], heads[1], heads[1])
    return [torch.randn(1, n, num_tokens, 8, generator=generator).double().requires_grad_() for n in sizes]


def _with_gradients(states: list[Tensor], attention: Callable[..., Tensor], real: int) -> list[Tensor]:
    """Output at the real tokens, and the gradient by each input of a sum that weighs every number differently."""
    found = attention(*states)[:, :, :real]
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view_as(found)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), states)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=5), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    window=st.sampled_from([None, 1, 3, 6]),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([None, 0.7]),
)
def test_attention_per_pair_is_attention_under_the_dense_mask(
    lengths: list[list[int]], padding: int, window: int | None, softcap: float | None, scale: float | None
) -> None:
    """Values and gradients by queries, keys and values, to 1e-10 in fp64: rankings, padding, windows, caps."""
    rule = _row(lengths, padding)
    real = len(rule[0]) - padding
    width = max(map(len, lengths))
    table = [[*sizes, *[0] * (width - len(sizes))] for sizes in lengths]
    mask = shared_prompt_mask(*rule, window=window)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        return attend(query, key, value, mask, scale=scale, softcap=softcap)

    def per_pair(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return pair_attention(query, key, value, table, window=window, scale=scale, softcap=softcap)

    wanted, got = (_with_gradients(_states(len(rule[0])), each, real) for each in (dense, per_pair))
    for one, other in zip(wanted, got, strict=True):
        # A window of 1 leaves nothing to choose: gradients by queries and keys are zero but for rounding.
        assert (one - other).abs().max() <= 1e-10 * one.abs().max() + 1e-14


def test_padding_gets_zeros_and_no_gradient() -> None:
    """Whatever stands there."""
    states = _states(7)
    found = pair_attention(*states, [[2, 1, 1]])
    assert torch.equal(found[:, :, 4:], torch.zeros(1, 4, 3, 8, dtype=torch.float64))
    for gradient in torch.autograd.grad(found.sum(), states):
        assert not gradient[:, :, 4:].any()
        assert gradient.isfinite().all()


def test_soft_cap_bends_the_scores() -> None:
    """Worked by hand: scores of +-4, capped at 2, are +-1.92806; their softmax weighs values of 1 and 0."""
    query, value = torch.tensor([[[[4.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    key = torch.tensor([[[[1.0], [-1.0]]]])
    assert attend(query, key, value, None, scale=1.0, softcap=2.0).item() == pytest.approx(0.979288, abs=1e-6)


def test_work_of_a_row_is_that_of_its_pairs() -> None:
    """Attention's FLOPs, forward and backward: a row of 4,096 tokens has exactly those of four rows of 1,024 with the
    same pairs. Under a dense mask it has four times as many."""
    pairs = [[100, 60, 60], [150, 40, 66], [90, 100, 78], [160, 60, 60]]  # 1,024 tokens

    def flops(attention: Callable[..., Tensor], lengths: list[list[int]]) -> int:
        counter: Any = FlopCounterMode(display=False, custom_mapping=CPU_KERNELS)
        with counter:
            states = [x.float().detach().requires_grad_() for x in _states(sum(map(sum, lengths)), (2, 2))]
            attention(*states, lengths).sum().backward()
        return int(counter.get_total_flops())

    def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]]) -> Tensor:
        return attend(query, key, value, shared_prompt_mask(*_row(lengths)))

    per_row, long = (flops(pair_attention, row) for row in (pairs, pairs * 4))
    assert per_row > 0
    assert long == 4 * per_row
    assert flops(dense, pairs * 4) == pytest.approx(16 * flops(dense, pairs), rel=1e-3)


def test_rows_longer_than_their_pairs_are_no_error_and_shorter_ones_are() -> None:
    """The assertion is ours: rows and their lengths are made together."""
    states = _states(6)
    assert pair_attention(*states, [[2, 2, 2]]).shape == (1, 4, 6, 8)
    with pytest.raises(AssertionError, match="longer than the row"):
        pair_attention(*states, [[2, 2, 3]])


def test_a_ranking_with_fewer_answers_than_the_table_is_wide() -> None:
    """Lengths of 0 are no answers: the pair's numbers are those of a table of its own width."""
    states = _states(6)
    assert torch.equal(pair_attention(*states, [[2, 2, 2, 0, 0]]), pair_attention(*states, [[2, 2, 2]]))
