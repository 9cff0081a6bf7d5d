"""Rows of packed pairs to log-probs: the one function that the reference, training and evaluation all use.

A: answer tokens, T: tokens of a plain sequence, P: pairs, V: vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dpo_train.data.packing import pack
from dpo_train.data.pairs import Logps, TokenPair
from dpo_train.errors import ModelError, first_line
from dpo_train.model.forward import RowLogps
from dpo_train.model.load import Policy
from dpo_train.model.rows import Row, build_row


def row_logps(policy: Policy, row: Row, *, with_squares: bool = False, with_router: bool = False) -> RowLogps:
    """Log-probs of a row's answers under the policy, with gradient where its parameters want one.

    Args:
        row: on the policy's device.
        with_squares: also what WPO's weights need; without gradient.
        with_router: also what the auxiliary loss of a mixture of experts needs; each prompt counts once.
    """
    result: RowLogps = policy.packed(row, with_squares=with_squares, with_router=with_router)
    return result


@torch.no_grad()
def score_pairs(
    policy: Policy, pairs: Sequence[TokenPair], row_tokens: int, *, most: Callable[[float], float] = float
) -> list[tuple[Logps, ...]]:
    """Per-token log-probs of each pair's answers, float32: chosen, rejected, and the others of a ranking.

    ``most`` gives the largest of a number on all ranks. A sharded policy's weights are gathered by all of them at once,
    so whoever has fewer rows does its last one again.
    """
    scores: dict[int, tuple[Logps, ...]] = {}
    rows = pack([pair.num_tokens for pair in pairs], row_tokens)
    for number in range(int(most(len(rows)))):
        members = rows[min(number, len(rows) - 1)]
        row_pairs = [pairs[index] for index in members]
        token_logps = row_logps(policy, build_row(row_pairs).to(policy.device)).token_logps_A.cpu().numpy()
        place = 0
        for index, pair in zip(members, row_pairs, strict=True):
            ends = [place + end for end in itertools.accumulate(map(len, pair.answer_ids), initial=0)]
            scores[index] = tuple(token_logps[start:end] for start, end in itertools.pairwise(ends))
            place = ends[-1]
    return [scores[index] for index in range(len(pairs))]


@torch.no_grad()
def check_layout(policy: Policy) -> None:
    """Compares a tiny packed row with the model's own logits on plain sequences.

    Catches every architecture whose attention, positions or logits our layout gets wrong, but for a window longer than
    the row (model/layout.py knows those by their config).

    Raises:
        ModelError: they differ.
    """
    vocabulary = policy.vocabulary
    generator = np.random.Generator(np.random.PCG64(0))
    sides = [generator.integers(0, vocabulary, size=n).astype(np.int32) for n in (5, 3, 4, 6, 2, 3)]
    pairs = [TokenPair("a", sides[0], sides[1], sides[2]), TokenPair("b", sides[3], sides[4], sides[5])]
    row = build_row(pairs).to(policy.device)
    try:
        packed_P2 = row.answer_sums(row_logps(policy, row).token_logps_A)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise _unfit(policy, f"{type(error).__name__}: {first_line(error)}") from error
    # bf16 keeps 8 bits of each logit; in fp32 the largest difference measured over all families is 1e-6 on CPUs, and
    # GPUs may add up in TF32.
    tolerance = 2e-2 if policy.bf16 or policy.device.type == "cuda" else 1e-4
    for pair, packed_2 in zip(pairs, packed_P2, strict=True):
        for answer_ids, packed in zip((pair.chosen_ids, pair.rejected_ids), packed_2, strict=True):
            ids_T = torch.from_numpy(np.concatenate([pair.prompt_ids, answer_ids])).long().to(policy.device)
            with policy.autocast():
                logits_TV = policy.model(input_ids=ids_T[None], use_cache=False).logits[0].float()
            logps_A = torch.log_softmax(logits_TV[len(pair.prompt_ids) - 1 : -1], dim=-1)
            plain = logps_A.gather(1, ids_T[len(pair.prompt_ids) :, None]).sum()
            if not torch.allclose(packed, plain, rtol=tolerance, atol=tolerance):
                raise _unfit(policy, f"log-prob {packed:.4f} packed and {plain:.4f} alone", "the same number")


def _unfit(policy: Policy, got: str, expected: str = "a decoder that takes a mask and positions") -> ModelError:
    return ModelError(
        f"The model in {policy.folder} ({type(policy.model).__name__}) cannot be trained in packed rows",
        got=got,
        expected=expected,
    )
