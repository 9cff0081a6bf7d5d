"""Rows of packed pairs to log-probs: the one function that the reference, training and evaluation all use.

T: tokens of a row, A: answer tokens of a row, P: pairs of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_train.core.attention import CHOSEN, PROMPT, REJECTED, shared_prompt_mask
from dpo_train.core.logprobs import token_logprobs
from dpo_train.data.packing import pack
from dpo_train.data.pairs import Logps, TokenPair
from dpo_train.errors import ModelError
from dpo_train.model.load import Policy


@dataclass(frozen=True)
class Row:
    """Several pairs in one run of tokens: prompt, chosen, rejected, prompt, ...

    ``source_A`` is the place whose hidden state predicts answer token A: the token before it, and for the first token
    of *both* answers the last token of the prompt.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    pair_T: Tensor
    part_T: Tensor
    source_A: Tensor
    target_A: Tensor
    pair_A: Tensor
    part_A: Tensor
    num_pairs: int


class RowLogps(NamedTuple):
    """Sums per answer, and what they were summed from."""

    chosen_P: Tensor
    rejected_P: Tensor
    token_logps_A: Tensor


def build_row(pairs: Sequence[TokenPair]) -> Row:
    """Lays pairs out in one row, on the CPU."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "positions", "pair", "part")}
    answers: dict[str, list[np.ndarray]] = {name: [] for name in ("source", "target", "pair", "part")}
    place = 0
    for index, pair in enumerate(pairs):
        prompt_length = len(pair.prompt_ids)
        last_prompt_token = place + prompt_length - 1
        for part, ids in ((PROMPT, pair.prompt_ids), (CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            first_position = 0 if part == PROMPT else prompt_length
            columns["ids"].append(ids)
            columns["positions"].append(np.arange(first_position, first_position + len(ids)))
            columns["pair"].append(np.full(len(ids), index))
            columns["part"].append(np.full(len(ids), part))
            if part != PROMPT:
                source = np.arange(place - 1, place + len(ids) - 1)
                source[0] = last_prompt_token
                answers["source"].append(source)
                answers["target"].append(ids)
                answers["pair"].append(np.full(len(ids), index))
                answers["part"].append(np.full(len(ids), part))
            place += len(ids)
    return Row(
        input_ids_T=_tensor(columns["ids"]),
        positions_T=_tensor(columns["positions"]),
        pair_T=_tensor(columns["pair"]),
        part_T=_tensor(columns["part"]),
        source_A=_tensor(answers["source"]),
        target_A=_tensor(answers["target"]),
        pair_A=_tensor(answers["pair"]),
        part_A=_tensor(answers["part"]),
        num_pairs=len(pairs),
    )


def row_logps(policy: Policy, row: Row) -> RowLogps:
    """Log-probs of a row's answers under the policy, with gradient where its parameters want one."""
    device = policy.device
    pair_T, part_T = row.pair_T.to(device), row.part_T.to(device)
    with policy.autocast():
        hidden_TD = policy.decoder(
            input_ids=row.input_ids_T.to(device)[None],
            position_ids=row.positions_T.to(device)[None],
            attention_mask=shared_prompt_mask(pair_T, part_T),
            use_cache=False,
        ).last_hidden_state[0]
        hidden_AD = hidden_TD[row.source_A.to(device)]
        head = policy.lm_head
        token_logps_A = token_logprobs(hidden_AD, head.weight, row.target_A.to(device), bias_V=head.bias)
    answer_A = 2 * row.pair_A.to(device) + (row.part_A.to(device) == REJECTED)
    sums = torch.zeros(2 * row.num_pairs, device=device).index_add(0, answer_A, token_logps_A).view(-1, 2)
    return RowLogps(sums[:, 0], sums[:, 1], token_logps_A)


def reference_logps(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """Sums of the stored per-token reference log-probs: chosen [P] and rejected [P], float32."""
    sums = []
    for side in ("reference_chosen_logps", "reference_rejected_logps"):
        # Summed by torch in fp32 like the policy's, in the same order.
        sums.append(torch.stack([torch.from_numpy(np.array(getattr(pair, side))).sum() for pair in pairs]))
    return sums[0], sums[1]


@torch.no_grad()
def score_pairs(policy: Policy, pairs: Sequence[TokenPair], row_tokens: int) -> list[tuple[Logps, Logps]]:
    """Per-token log-probs of both answers of each pair, float32, in the order given."""
    scores: dict[int, tuple[Logps, Logps]] = {}
    for members in pack([pair.num_tokens for pair in pairs], row_tokens):
        row_pairs = [pairs[index] for index in members]
        token_logps = row_logps(policy, build_row(row_pairs)).token_logps_A.float().cpu().numpy()
        place = 0
        for index, pair in zip(members, row_pairs, strict=True):
            middle = place + len(pair.chosen_ids)
            end = middle + len(pair.rejected_ids)
            scores[index] = (token_logps[place:middle], token_logps[middle:end])
            place = end
    return [scores[index] for index in range(len(pairs))]


@torch.no_grad()
def check_layout(policy: Policy) -> None:
    """Compares a tiny packed row with the model's own logits on plain sequences.

    Catches every architecture whose attention, positions or logits (scaling, soft-capping) our layout gets wrong.

    Raises:
        ModelError: they differ.
    """
    vocabulary = policy.lm_head.weight.shape[0]
    generator = np.random.Generator(np.random.PCG64(0))
    sides = [generator.integers(0, vocabulary, size=n).astype(np.int32) for n in (5, 3, 4, 6, 2, 3)]
    pairs = [TokenPair("a", sides[0], sides[1], sides[2]), TokenPair("b", sides[3], sides[4], sides[5])]
    packed = row_logps(policy, build_row(pairs))
    for index, pair in enumerate(pairs):
        for answer_ids, packed_logps in ((pair.chosen_ids, packed.chosen_P), (pair.rejected_ids, packed.rejected_P)):
            ids_T = torch.from_numpy(np.concatenate([pair.prompt_ids, answer_ids])).long().to(policy.device)
            with policy.autocast():
                logits_TV = policy.model(input_ids=ids_T[None], use_cache=False).logits[0].float()
            logps_A = torch.log_softmax(logits_TV[len(pair.prompt_ids) - 1 : -1], dim=-1)
            plain = logps_A.gather(1, ids_T[len(pair.prompt_ids) :, None]).sum()
            # bf16 keeps 8 bits of each logit; in fp32 the largest difference measured over five families is 1e-6.
            tolerance = 1e-4 if policy.device.type == "cpu" else 2e-2
            if not torch.allclose(packed_logps[index], plain, rtol=tolerance, atol=tolerance):
                raise ModelError(
                    f"The model in {policy.folder} ({type(policy.model).__name__}) cannot be trained in packed rows",
                    got=f"log-prob {packed_logps[index]:.4f} packed and {plain:.4f} alone",
                    expected="the same number",
                )


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
