"""Padded = packed = prompt-shared: log-probs of every token and gradients of every weight, for every family.

The padded layout is the model's own: a batch of whole sequences with its own masks and positions, one for each answer.
A: answer tokens of all pairs, in the order pair, side, place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_train.data.packing import pack
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from tests.tiny import random_pairs, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, WINDOW, write

# Ragged lengths, most sequences longer than the window; then a prompt of one token, and answers of one token.
PAIRS = [
    *random_pairs(5, vocabulary=VOCABULARY),
    TokenPair("short", *(np.array(ids, dtype=np.int32) for ids in ([5], [6], [7]))),
    TokenPair("long", *(np.arange(3, 3 + n, dtype=np.int32) for n in (11, 12, 1))),
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """One fully trainable policy of each family."""
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_policy(write(folder / name, build), lora=False) for name, build in FAMILIES.items()}


def padded(policy: Policy, pairs: Sequence[TokenPair]) -> Tensor:
    """Log-prob of each answer token by the model's own forward, softmax in fp64."""
    sequences = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids_BT = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for index, (prompt, answer) in enumerate(sequences):
        whole = np.concatenate([prompt, answer])
        ids_BT[index, : len(whole)] = torch.from_numpy(whole)
        mask_BT[index, : len(whole)] = 1
    logits_BTV = policy.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    logps_BTV = torch.log_softmax(logits_BTV.double(), dim=-1)
    found = []
    for index, (prompt, answer) in enumerate(sequences):
        rows = logps_BTV[index, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        found.append(rows.gather(1, torch.from_numpy(answer).long()[:, None]).squeeze(1))
    return torch.cat(found)


def shared(policy: Policy, pairs: Sequence[TokenPair], rows: Sequence[Sequence[int]]) -> Tensor:
    """The same from packed rows."""
    found: dict[int, Tensor] = {}
    for indices in rows:
        logps_A = row_logps(policy, build_row([pairs[i] for i in indices])).token_logps_A
        sizes = [len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in indices]
        found.update(zip(indices, logps_A.split(sizes), strict=True))
    return torch.cat([found[index] for index in range(len(pairs))])


def gradient(policy: Policy, logps_A: Tensor) -> dict[str, Tensor]:
    """Of the log-probs under random weights; of one sign, because equal answers of both signs would cancel."""
    generator = torch.Generator().manual_seed(7)
    policy.model.zero_grad()
    weights_A = 0.5 + torch.rand(len(logps_A), generator=generator)
    (logps_A * weights_A.to(logps_A.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def assert_same(
    policy: Policy, pairs: Sequence[TokenPair], rows: Sequence[Sequence[int]], *, floor: float = 1e-3
) -> None:
    """1e-5 relative. A weight whose gradient all but vanishes (the queries, where all tokens are equal) is measured by
    the given share of the whole gradient instead."""
    wanted_A, got_A = padded(policy, pairs), shared(policy, pairs, rows)
    assert ((got_A - wanted_A).abs() <= 1e-5 * wanted_A.abs().clamp(min=0.1)).all()
    wanted, got = gradient(policy, wanted_A), gradient(policy, got_A)
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-5 * max(wanted[name].norm(), floor * whole), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["one row", "full rows", "a row for each pair"])
def test_layouts_agree_by_token_and_by_weight(policies: dict[str, Policy], family: str, rows: str) -> None:
    """1e-5 relative; "full rows": the limit is one pair's length, which fills its row to the last token."""
    lengths = [pair.num_tokens for pair in PAIRS]
    limits = {"one row": sum(lengths), "full rows": max(lengths), "a row for each pair": 1}
    packed = pack(lengths, limits[rows])
    if rows == "full rows":
        assert any(sum(lengths[i] for i in row) == limits[rows] for row in packed)
    assert_same(policies[family], PAIRS, packed)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3"])
def test_window_is_felt(policies: dict[str, Policy], family: str) -> None:
    """Without the window the numbers differ by a thousand tolerances: the tests above would notice."""
    policy = policies[family]
    assert policy.layout.window == WINDOW
    blind = replace_layout(policy, window=None)
    with torch.no_grad():
        whole = [list(range(len(PAIRS)))]
        difference = (shared(blind, PAIRS, whole) - shared(policy, PAIRS, whole)).abs().max()
    assert difference > 1e-2


def replace_layout(policy: Policy, **changes: Any) -> Policy:
    """The same policy with a layout that is wrong on purpose."""
    copy = Policy(model=policy.model, adapters=None, folder=policy.folder, device=policy.device)
    copy.__dict__["layout"] = replace(policy.layout, **changes)
    return copy


ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=10).map(lambda x: np.array(x, dtype=np.int32))
pair_lists = st.lists(st.builds(TokenPair, st.just("p"), ids, ids, ids), min_size=1, max_size=5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@given(pairs=pair_lists, row_tokens=st.integers(1, 80))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pairs_in_any_rows_agree(
    policies: dict[str, Policy], family: str, pairs: list[TokenPair], row_tokens: int
) -> None:
    """Ragged lengths down to one token, any packing."""
    assert_same(policies[family], pairs, pack([pair.num_tokens for pair in pairs], row_tokens), floor=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_pairs_say_never_leaks(policies: dict[str, Policy], family: str) -> None:
    """Other tokens in every other pair of the row leave a pair's numbers bit for bit."""
    policy = policies[family]
    if policy.layout.experts:
        pytest.skip("experts batch the tokens that chose them: the sums' order follows the other tokens")
    others = [replace(pair, prompt_ids=pair.prompt_ids[::-1].copy(), chosen_ids=(pair.chosen_ids + 1) % VOCABULARY)
              for pair in PAIRS]  # fmt: skip
    with torch.no_grad():
        for index in (0, 3):
            mixed = [PAIRS[i] if i == index else others[i] for i in range(len(PAIRS))]
            places = [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in PAIRS]
            before, after = (
                shared(policy, pairs, [list(range(len(PAIRS)))]).split(places)[index] for pairs in (PAIRS, mixed)
            )
            assert torch.equal(before, after)


def test_ld_weights_are_worked_by_hand() -> None:
    """Answers of 3 and 1 tokens share one position, the others weigh alpha; of 1 and 2 likewise."""
    pairs = [
        TokenPair("a", *(np.array(ids, dtype=np.int32) for ids in ([9], [1, 2, 3], [4]))),
        TokenPair("b", *(np.array(ids, dtype=np.int32) for ids in ([9, 9], [5], [6, 7]))),
    ]
    row = build_row(pairs)
    assert row.ld_weights(0.25).tolist() == [1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 0.25]
    assert row.answer_sums(torch.arange(7.0)).tolist() == [[3.0, 3.0], [4.0, 11.0]]
    assert row.lengths_P2.tolist() == [[3, 1], [1, 2]]


def test_reference_is_laid_out_as_the_tokens_are(tmp_path: Path) -> None:
    """Stored log-probs meet their tokens whatever the packing."""
    del tmp_path
    pair = TokenPair("a", *(np.array(i, dtype=np.int32) for i in ([9], [1, 2], [4])), *(
        np.array(x, dtype=np.float32) for x in ([-1.0, -2.0], [-4.0])))  # fmt: skip
    assert build_row([pair, pair]).reference_A.tolist() == [-1.0, -2.0, -4.0] * 2
    assert build_row([replace(pair, reference_chosen_logps=None)]).reference_A is None
