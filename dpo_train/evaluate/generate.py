"""Answers of reference and policy to the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dpo_train.config import ModelConfig
from dpo_train.data.folder import ADAPTER_FOLDER, model_folder
from dpo_train.data.pairs import Ids
from dpo_train.data.tokens import load_tokenizer
from dpo_train.model.forward import autocast
from dpo_train.model.load import Policy, load_policy, select_device

ANSWERS_SCHEMA = pa.schema([("pair_id", pa.string()), ("model", pa.string()), ("answer", pa.string())])


@torch.no_grad()
def answer(policy: Policy, tokenizer: Any, prompts: Sequence[Ids], *, max_tokens: int, seed: int) -> list[str]:
    """Samples one answer per prompt (temperature 0.7, top-p 0.9), each seeded by itself.

    Seeds do not depend on the order or the number of prompts, so an answer can be made again alone.
    """
    texts = []
    for prompt_ids in prompts:
        torch.manual_seed(seed)
        ids_BT = torch.from_numpy(prompt_ids).long().to(policy.device)[None]
        with autocast(policy.device):
            output_BT = policy.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                repetition_penalty=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(str(tokenizer.decode(output_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)).strip())
    return texts


class AnswerPrompts:
    """Rows of (pair_id, prompt_ids, model) to ANSWERS_SCHEMA, ``model`` being "reference" or "policy"."""

    def __init__(self, model: ModelConfig, device: str, weights: str, max_tokens: int, seed: int) -> None:
        self._model = model
        self._device = select_device(device)
        self._weights = Path(weights)
        self._base: Policy | None = None
        self._tokenizer = load_tokenizer(model_folder(model.path), trust_remote_code=model.trust_remote_code)
        self._answer = functools.partial(answer, tokenizer=self._tokenizer, max_tokens=max_tokens, seed=seed)
        self._policy = load_policy(model, device=self._device, weights=self._weights)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row in table.to_pylist():
            prompts = [np.array(row["prompt_ids"], dtype=np.int32)]
            texts = (
                self._reference_answers(prompts)
                if row["model"] == "reference"
                else self._answer(self._policy, prompts=prompts)
            )
            rows.append({"pair_id": row["pair_id"], "model": row["model"], "answer": texts[0]})
        return pa.Table.from_pylist(rows, schema=ANSWERS_SCHEMA)

    def _reference_answers(self, prompts: list[Any]) -> list[str]:
        if (self._weights / ADAPTER_FOLDER).is_dir():
            with self._policy.reference():
                return self._answer(self._policy, prompts=prompts)
        self._base = self._base or load_policy(self._model, device=self._device, frozen_base=False)
        return self._answer(self._base, prompts=prompts)
