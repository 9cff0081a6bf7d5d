"""The three ways in which a packed row's mask reaches a model's attention say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train.core.attention import shared_prompt_mask
from dpo_train.model.attention import NAME, block_mask, lengths_table
from dpo_train.model.layout import FULL, SLIDING
from dpo_train.model.load import Policy
from dpo_train.model.rows import Row, build_row
from tests.tiny import random_pairs, random_rankings, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

GROUPED, WINDOWED, CAPPED = "llama", "gemma3", "gemma2"
PAIRS = random_pairs(4, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Grouped queries; layers with a window; the same with caps on the scores."""
    folder = tmp_path_factory.mktemp("families")
    return {
        name: tiny_policy(write(folder / name, FAMILIES[name]), lora=False, trainable=False)
        for name in (GROUPED, WINDOWED, CAPPED)
    }


@torch.no_grad()
def _hidden(policy: Policy, row: Row, mask_of: Any) -> torch.Tensor:
    """The decoder's last states under masks of one kind."""
    window = policy.layout.window
    masks = (
        {FULL: mask_of(row, None), SLIDING: mask_of(row, window)}
        if policy.layout.by_layer_type
        else mask_of(row, window)
    )
    decoder = policy.model.get_decoder()
    hidden: torch.Tensor = decoder(
        input_ids=row.input_ids_T[None], position_ids=row.positions_T[None], attention_mask=masks, use_cache=False
    ).last_hidden_state[0]
    return hidden


def _dense(row: Row, window: int | None) -> torch.Tensor:
    return shared_prompt_mask(row.pair_T, row.part_T, row.positions_T, window=window)


@pytest.mark.parametrize("family", [GROUPED, WINDOWED, CAPPED])
@pytest.mark.parametrize("answers", [2, 4])
def test_lengths_blocks_and_dense_masks_give_the_same_states(
    policies: dict[str, Policy], family: str, answers: int
) -> None:
    """To 1e-5 of the largest; FlexAttention runs as it does on a GPU, but for its backward, which CPUs lack."""
    row = build_row(PAIRS if answers == 2 else random_rankings(4, most=answers, vocabulary=VOCABULARY))
    policy = policies[family]
    wanted = _hidden(policy, row, _dense)
    for mask_of in (lengths_table, block_mask):
        assert (_hidden(policy, row, mask_of) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_mask_that_hides_nothing_between_pairs_is_noticed(policies: dict[str, Policy]) -> None:
    """The comparison above can fail: one pair more in front of the others changes a plain causal mask's states."""
    row = build_row(PAIRS)
    causal = torch.ones(len(row.pair_T), len(row.pair_T), dtype=torch.bool).tril()[None, None]
    wanted = _hidden(policies[GROUPED], row, _dense)
    assert (_hidden(policies[GROUPED], row, lambda *_: causal) - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("family", [GROUPED, CAPPED])
def test_generation_with_a_cache_is_the_model_s_own(policies: dict[str, Policy], family: str) -> None:
    """Greedy tokens equal those that the model picks with its eager attention."""
    model: Any = policies[family].model
    ids = torch.from_numpy(PAIRS[0].prompt_ids).long()[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, **options)
    model.set_attn_implementation("eager")
    try:
        assert torch.equal(ours, model.generate(ids, **options))
    finally:
        model.set_attn_implementation(NAME)


def test_a_saved_model_does_not_ask_for_our_attention(policies: dict[str, Policy], tmp_path: Path) -> None:
    """Its folder loads where this package is not installed."""
    policies[GROUPED].model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
