"""The mask of rows in which two answers share a prompt."""

from __future__ import annotations

import torch

from dpo_train.core.attention import CHOSEN, PROMPT, REJECTED, additive, shared_prompt_mask


def _mask(pairs: list[int], parts: list[int]) -> list[str]:
    """One line per query: x where it sees the key."""
    mask = shared_prompt_mask(torch.tensor(pairs), torch.tensor(parts))
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
    mask = shared_prompt_mask(torch.tensor([0, 0, 0, -1]), torch.tensor([PROMPT, CHOSEN, REJECTED, PROMPT]))
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
    mask = shared_prompt_mask(torch.tensor([0, 0, 0, -1]), torch.tensor([PROMPT, CHOSEN, REJECTED, PROMPT]))
    scores = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    added = torch.softmax(scores + additive(mask, torch.float32), dim=-1)
    assert torch.allclose(added, torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1))
