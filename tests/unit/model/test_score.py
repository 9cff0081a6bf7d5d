"""Packed rows give exactly the log-probs of separate plain forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_train.core.logprobs import LogitTransform
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import ModelError
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import check_layout, row_logps, score_pairs
from tests.tiny import random_pairs, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

PAIRS = random_pairs(5, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """One frozen policy of each family."""
    folder = tmp_path_factory.mktemp("families")
    return {
        name: tiny_policy(write(folder / name, build), lora=False, trainable=False) for name, build in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def llama(policies: dict[str, Policy]) -> Policy:
    """Where one family is enough."""
    return policies["llama"]


@torch.no_grad()
def _plain(policy: Policy, prompt_ids: Any, answer_ids: Any) -> torch.Tensor:
    """Per-token log-probs of an answer, from the model's own forward on the plain sequence, softmax in fp64."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, answer_ids])).long()
    logits = policy.model(input_ids=ids[None]).logits[0].double()
    logps = torch.log_softmax(logits[len(prompt_ids) - 1 : -1], dim=-1)
    return logps.gather(1, ids[len(prompt_ids) :, None]).squeeze(1)


@torch.no_grad()
def _packed(policy: Policy, pairs: Sequence[TokenPair]) -> list[tuple[float, float]]:
    row = build_row(pairs)
    return [(chosen, rejected) for chosen, rejected in row.answer_sums(row_logps(policy, row).token_logps_A).tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_a_plain_forward_per_answer(policies: dict[str, Policy], family: str) -> None:
    """Five pairs in one row against ten separate forwards, each sum to 1e-5 relative and each token alike."""
    policy = policies[family]
    for pair, sums in zip(PAIRS, _packed(policy, PAIRS), strict=True):
        for answer_ids, total in zip((pair.chosen_ids, pair.rejected_ids), sums, strict=True):
            assert total == pytest.approx(_plain(policy, pair.prompt_ids, answer_ids).sum().item(), rel=1e-5)
    for pair, scores in zip(PAIRS, score_pairs(policy, PAIRS, 40), strict=True):
        for answer_ids, logps in zip((pair.chosen_ids, pair.rejected_ids), scores, strict=True):
            assert logps.tolist() == pytest.approx(_plain(policy, pair.prompt_ids, answer_ids).tolist(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_check_passes_where_packing_is_right(policies: dict[str, Policy], family: str) -> None:
    """The check that runs before each training lets every family through."""
    check_layout(policies[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_other_rejected_tokens_leave_the_chosen_answer_bit_for_bit(policies: dict[str, Policy], family: str) -> None:
    """The chosen answer's numbers do not change in any bit (experts: to 1e-6); the rejected one's do."""
    pair = PAIRS[0]
    other = replace(pair, rejected_ids=(pair.rejected_ids + 1) % VOCABULARY)
    before, after = _packed(policies[family], [pair])[0], _packed(policies[family], [other])[0]
    # Experts batch the tokens that chose them: the order of their sums follows the other tokens.
    exact = policies[family].layout.experts is None
    assert after[0] == (before[0] if exact else pytest.approx(before[0], rel=1e-6))
    assert after[1] != pytest.approx(before[1], rel=1e-3)


def test_other_chosen_tokens_leave_the_rejected_answer_bit_for_bit(llama: Policy) -> None:
    """The rejected answer stands after the chosen one in the row and yet does not see it."""
    pair = PAIRS[0]
    other = replace(pair, chosen_ids=(pair.chosen_ids + 1) % VOCABULARY)
    before, after = _packed(llama, [pair])[0], _packed(llama, [other])[0]
    assert after[1] == before[1]
    assert after[0] != before[0]


def test_neighbours_in_a_row_do_not_leak(llama: Policy) -> None:
    """A pair alone, first, last, or among others has the same log-probs (1e-6 relative)."""
    alone = [_packed(llama, [pair])[0] for pair in PAIRS]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        packed = _packed(llama, [PAIRS[i] for i in order])
        for index, sums in zip(order, packed, strict=True):
            assert sums == pytest.approx(alone[index], rel=1e-6)


def test_swapping_the_answers_swaps_their_log_probs(llama: Policy) -> None:
    """Neither place in the row is favoured."""
    pair = PAIRS[1]
    swapped = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
    assert _packed(llama, [swapped])[0][::-1] == pytest.approx(_packed(llama, [pair])[0], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_answers_of_one_token(policies: dict[str, Policy], family: str) -> None:
    """Both answers' only token is predicted by the prompt's only token: one distribution gives both."""
    pair = TokenPair("p", *(np.array([i], dtype=np.int32) for i in (5, 6, 7)))
    chosen, rejected = _packed(policies[family], [PAIRS[0], pair])[1]
    assert chosen == pytest.approx(_plain(policies[family], pair.prompt_ids, pair.chosen_ids).item(), rel=1e-5)
    assert rejected == pytest.approx(_plain(policies[family], pair.prompt_ids, pair.rejected_ids).item(), rel=1e-5)


def test_row_is_laid_out_as_worked_by_hand() -> None:
    """A pair of 2 + 2 + 1 tokens and one of 1 + 1 + 2."""
    pairs = [
        TokenPair("a", *(np.array(ids, dtype=np.int32) for ids in ([10, 11], [12, 13], [14]))),
        TokenPair("b", *(np.array(ids, dtype=np.int32) for ids in ([20], [21], [22, 23]))),
    ]
    row = build_row(pairs)
    assert row.input_ids_T.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2]
    assert row.pair_T.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert row.part_T.tolist() == [0, 0, 1, 1, 2, 0, 1, 2, 2]
    assert row.target_A.tolist() == [12, 13, 14, 21, 22, 23]
    assert row.source_A.tolist() == [1, 2, 1, 5, 5, 7]
    assert row.pair_A.tolist() == [0, 0, 0, 1, 1, 1]
    assert row.part_A.tolist() == [1, 1, 2, 1, 2, 2]
    assert row.place_A.tolist() == [0, 1, 0, 0, 0, 1]
    assert row.num_pairs == 2


def test_scores_come_in_the_order_given_for_any_row_length(llama: Policy) -> None:
    """Packing sorts by length; the answer does not show it. Rows of 1 token put each pair alone."""
    alone = score_pairs(llama, PAIRS, 1)
    for row_tokens in (20, 1000):
        for pair, wanted, got in zip(PAIRS, alone, score_pairs(llama, PAIRS, row_tokens), strict=True):
            assert [len(logps) for logps in got] == [len(pair.chosen_ids), len(pair.rejected_ids)]
            for side in (0, 1):
                assert got[side].tolist() == pytest.approx(wanted[side].tolist(), rel=1e-5)
                assert got[side].dtype == np.float32


def test_stored_reference_sums_to_the_row_sums(llama: Policy) -> None:
    """What is stored per token is what training adds up: policy and reference agree to fp32's rounding."""
    scored = [
        replace(pair, reference_chosen_logps=chosen, reference_rejected_logps=rejected)
        for pair, (chosen, rejected) in zip(PAIRS, score_pairs(llama, PAIRS, 64), strict=True)
    ]
    row = build_row(scored)
    assert row.reference_A is not None
    sums = row.answer_sums(row.reference_A).tolist()
    for wanted, got in zip(_packed(llama, PAIRS), sums, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


def test_layout_check_refuses_logits_that_are_made_otherwise(policies: dict[str, Policy]) -> None:
    """Cohere multiplies its logits by a constant; a layout that did not know it is caught by the numbers."""
    policy = policies["cohere"]
    unaware = Policy(model=policy.model, adapters=None, folder=policy.folder, device=policy.device)
    unaware.__dict__["layout"] = replace(policy.layout, transform=LogitTransform())
    with pytest.raises(ModelError, match="cannot be trained in packed rows"):
        check_layout(unaware)


class OtherDecoder:
    """A model whose decoder is another."""

    def __init__(self, model: Any, decoder: Any) -> None:
        self._model, self._decoder = model, decoder

    def get_decoder(self) -> Any:
        return self._decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)


def _with_decoder(policy: Policy, decoder: Any) -> Policy:
    return Policy(model=OtherDecoder(policy.model, decoder), adapters=None, folder=policy.folder, device=policy.device)


def test_layout_check_refuses_a_decoder_that_takes_no_mask(llama: Policy) -> None:
    """A state-space model's forward, say, raises on arguments that it does not know: refused by name, no traceback."""
    with pytest.raises(ModelError, match=r"cannot be trained in packed rows\. Got: TypeError"):
        check_layout(_with_decoder(llama, lambda input_ids: None))


def test_layout_check_refuses_a_model_that_ignores_positions_and_mask(llama: Policy) -> None:
    """Were a decoder to take the row as one plain sequence, answers would see each other."""
    decoder = llama.model.get_decoder()
    with pytest.raises(ModelError, match="the same number"):
        check_layout(_with_decoder(llama, lambda input_ids, **_: decoder(input_ids=input_ids, use_cache=False)))
