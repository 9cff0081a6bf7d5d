"""Pairs laid out in rows: prompt, chosen, rejected, prompt, ...; of a ranking all answers follow their prompt.

T: tokens of a row, A: answer tokens of a row, P: pairs of a row, K: answers of the row's longest ranking, two where
there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_train.core.attention import CHOSEN, PROMPT
from dpo_train.data.pairs import TokenPair


@dataclass(frozen=True)
class Row:
    """Several pairs in one run of tokens.

    ``source_A`` is the place whose hidden state predicts answer token A: the token before it, and for the first token
    of *each* answer the last token of the prompt.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    pair_T: Tensor
    part_T: Tensor
    source_A: Tensor
    target_A: Tensor
    pair_A: Tensor
    part_A: Tensor
    place_A: Tensor
    """Of the token within its answer, from 0."""
    prompt_lengths_P: Tensor
    lengths_PK: Tensor
    """Tokens of each answer, best first; 0 where a pair has fewer answers."""
    reference_A: Tensor | None
    """The reference's log-prob of each answer token, once scored; float32."""

    @property
    def num_pairs(self) -> int:
        return len(self.lengths_PK)

    @property
    def lengths_P2(self) -> Tensor:
        """Answer tokens of chosen and rejected."""
        return self.lengths_PK[:, :2]

    def to(self, device: torch.device) -> Row:
        """The row on a device; copies do not wait for each other."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None})

    def padded(self, multiple: int) -> Row:
        """The row with padding behind it, up to a multiple of so many tokens. Answers stay where they are."""
        missing = -len(self.input_ids_T) % multiple
        values = {"input_ids_T": 0, "positions_T": 0, "pair_T": -1, "part_T": PROMPT}
        return replace(self, **{name: F.pad(getattr(self, name), (0, missing), value=v) for name, v in values.items()})

    def answer_sums(self, values_A: Tensor) -> Tensor:
        """Sum over the tokens of each answer: [P, K], chosen, rejected and the others; 0 where there is no answer."""
        num_answers = self.lengths_PK.shape[1]
        answer_A = num_answers * self.pair_A + (self.part_A - CHOSEN)
        return values_A.new_zeros(self.lengths_PK.numel()).index_add(0, answer_A, values_A).view(-1, num_answers)

    def ld_weights(self, alpha: float) -> Tensor:
        """LD-DPO's weight of each answer token (arXiv 2409.06411): 1 up to the shorter answer's length, then alpha.

        It is defined for pairs.
        """
        shared_A = self.lengths_P2.min(dim=1).values[self.pair_A]
        return torch.where(self.place_A < shared_A, 1.0, alpha)


def build_row(pairs: Sequence[TokenPair]) -> Row:
    """Lays pairs out in one row, on the CPU."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "positions", "pair", "part")}
    answers: dict[str, list[np.ndarray]] = {name: [] for name in ("source", "target", "pair", "part", "place")}
    start = 0
    for index, pair in enumerate(pairs):
        prompt_length = len(pair.prompt_ids)
        last_prompt_token = start + prompt_length - 1
        for part, ids in enumerate((pair.prompt_ids, *pair.answer_ids), PROMPT):
            first_position = 0 if part == PROMPT else prompt_length
            columns["ids"].append(ids)
            columns["positions"].append(np.arange(first_position, first_position + len(ids)))
            columns["pair"].append(np.full(len(ids), index))
            columns["part"].append(np.full(len(ids), part))
            if part != PROMPT:
                source = np.arange(start - 1, start + len(ids) - 1)
                source[:1] = last_prompt_token  # an answer that is not there has no first token
                answers["source"].append(source)
                answers["target"].append(ids)
                answers["pair"].append(np.full(len(ids), index))
                answers["part"].append(np.full(len(ids), part))
                answers["place"].append(np.arange(len(ids)))
            start += len(ids)
    return Row(
        input_ids_T=_tensor(columns["ids"]),
        positions_T=_tensor(columns["positions"]),
        pair_T=_tensor(columns["pair"]),
        part_T=_tensor(columns["part"]),
        source_A=_tensor(answers["source"]),
        target_A=_tensor(answers["target"]),
        pair_A=_tensor(answers["pair"]),
        part_A=_tensor(answers["part"]),
        place_A=_tensor(answers["place"]),
        prompt_lengths_P=torch.tensor([len(pair.prompt_ids) for pair in pairs]),
        lengths_PK=_lengths(pairs),
        reference_A=_reference(pairs),
    )


def _lengths(pairs: Sequence[TokenPair]) -> Tensor:
    most = max((len(pair.other_ids) for pair in pairs), default=0)
    rows = [[len(ids) for ids in pair.answer_ids] + [0] * (most - len(pair.other_ids)) for pair in pairs]
    return torch.tensor(rows)


def _reference(pairs: Sequence[TokenPair]) -> Tensor | None:
    parts: list[np.ndarray] = []
    for pair in pairs:
        if pair.reference_chosen_logps is None or pair.reference_rejected_logps is None:
            return None
        if len(pair.reference_other_logps) < len(pair.other_ids):
            return None
        parts += [pair.reference_chosen_logps, pair.reference_rejected_logps, *pair.reference_other_logps]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
