"""Rankings in packed rows: every answer behind its prompt, as if it stood there alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_train.data.pairs import Ids, TokenPair
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import score_pairs
from tests.tiny import random_rankings, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write


def _ids(*values: int) -> Ids:
    return np.array(values, dtype=np.int32)


RANKING = TokenPair("a", _ids(9, 8), _ids(1, 2), _ids(3), other_ids=(_ids(4, 5), _ids(6)))
PAIR = TokenPair("b", _ids(9), _ids(5), _ids(6, 7))


def test_row_of_a_ranking_and_a_pair_is_worked_by_hand() -> None:
    """Each answer's positions go on from its prompt, and its first token is predicted by the prompt's last."""
    row = build_row([RANKING, PAIR])
    assert row.input_ids_T.tolist() == [9, 8, 1, 2, 3, 4, 5, 6, 9, 5, 6, 7]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 2, 2, 3, 2, 0, 1, 1, 2]
    assert row.part_T.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 0, 1, 2, 2]
    assert row.source_A.tolist() == [1, 2, 1, 1, 5, 1, 8, 8, 10]
    assert row.target_A.tolist() == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert row.lengths_PK.tolist() == [[2, 1, 2, 1], [1, 2, 0, 0]]
    assert row.lengths_P2.tolist() == [[2, 1], [1, 2]]
    assert row.answer_sums(torch.arange(9.0)).tolist() == [[1.0, 2.0, 7.0, 5.0], [6.0, 15.0, 0.0, 0.0]]


def test_pairs_alone_have_two_columns() -> None:
    """As before there were rankings."""
    row = build_row([PAIR, PAIR])
    assert row.lengths_PK.tolist() == row.lengths_P2.tolist() == [[1, 2], [1, 2]]
    assert row.answer_sums(torch.arange(6.0)).tolist() == [[0.0, 3.0], [3.0, 9.0]]


def test_reference_of_all_answers_is_laid_out_as_the_tokens_are() -> None:
    """One that lacks an answer's is none: the rest would meet the wrong tokens."""
    logps = [np.array(values, dtype=np.float32) for values in ([-1, -2], [-3], [-4, -5], [-6])]
    scored = replace(
        RANKING,
        reference_chosen_logps=logps[0],
        reference_rejected_logps=logps[1],
        reference_other_logps=tuple(logps[2:]),
    )
    reference = build_row([scored]).reference_A
    assert reference is not None
    assert reference.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert build_row([replace(scored, reference_other_logps=(logps[2],))]).reference_A is None


def _alone(policy: Policy, prompt: Ids, answer: Ids) -> list[float]:
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
    with torch.no_grad():
        logps = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1].double(), dim=-1)
    found: list[float] = logps.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].tolist()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_each_answer_scores_as_alone_after_its_prompt(tmp_path: Path, family: str) -> None:
    """2 to 5 answers in rows of several pairs; with a window, learned positions and experts too."""
    policy = tiny_policy(write(tmp_path, FAMILIES[family]), lora=False, trainable=False)
    pairs: Sequence[TokenPair] = random_rankings(6, vocabulary=VOCABULARY)
    assert [len(pair.answer_ids) for pair in pairs] == [2, 3, 4, 5, 2, 3]
    for pair, scores in zip(pairs, score_pairs(policy, pairs, 80), strict=True):
        for ids, logps in zip(pair.answer_ids, scores, strict=True):
            assert logps.dtype == np.float32
            assert logps.tolist() == pytest.approx(_alone(policy, pair.prompt_ids, ids), rel=1e-4, abs=1e-5)
    (again,) = with_reference(policy, pairs[3:4])
    assert [len(logps) for logps in again.reference_other_logps] == [len(ids) for ids in again.other_ids]
