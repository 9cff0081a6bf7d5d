"""Answers of reference and policy to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_train.data.pairs import Ids
from dpo_train.model.load import Policy


@torch.no_grad()
def answer(policy: Policy, tokenizer: Any, prompts: Sequence[Ids], *, max_tokens: int, seed: int) -> list[str]:
    """Samples one answer per prompt (temperature 0.7, top-p 0.9), each seeded by itself.

    Seeds do not depend on the order or the number of prompts, so an answer can be made again alone.
    """
    texts = []
    for prompt_ids in prompts:
        torch.manual_seed(seed)
        ids_BT = torch.from_numpy(prompt_ids).long().to(policy.device)[None]
        with policy.autocast():
            output_BT = policy.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(str(tokenizer.decode(output_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)).strip())
    return texts
