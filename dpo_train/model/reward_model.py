"""Reward models: a sequence classifier with one output, the reward of a conversation's last answer.

B conversations of a batch, T tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_train.errors import ModelError, RunError, first_line

BATCH_TOKENS = 8192
"""Of a batch, padding included."""

Conversation = tuple[Sequence[Mapping[str, str]], str]
"""Messages {role, content}, and the answer."""


class RewardModel:
    """Rewards conversations, in fp32 on CPUs and bf16 on GPUs.

    A batch gives what each conversation gives alone: padding is masked, and is never a token that pooling looks for.

    Args:
        folder: of the model and its tokenizer, in the Hugging Face layout.
        max_tokens: a longer conversation loses its start, all but the token that opens it.

    Raises:
        ModelError: it cannot be loaded, or gives not one number.
    """

    def __init__(self, folder: Path, *, device: torch.device, max_tokens: int) -> None:
        self._folder, self._device = folder, device
        self._model = _load(folder, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
        self._tokenizer = _tokenizer(folder)
        self._has_pad = self._model.config.pad_token_id is not None
        self._max_tokens = min(max_tokens, _positions(self._model), self._tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward of each; NaN where the model computes none, and of a conversation without a token.

        Raises:
            RunError: the chat template refuses a conversation.
        """
        encoded = [self._encode(messages, answer) for messages, answer in conversations]
        sizes = [len(item["input_ids"]) for item in encoded]
        order = sorted(filter(sizes.__getitem__, range(len(sizes))), key=sizes.__getitem__, reverse=True)
        rewards = [math.nan] * len(encoded)
        while order:
            count = max(1, BATCH_TOKENS // sizes[order[0]])
            batch, order = order[:count], order[count:]
            rewards_B = self._model(**self._batch([encoded[index] for index in batch])).logits[:, 0].float()
            for index, reward in zip(batch, rewards_B.tolist(), strict=True):
                rewards[index] = reward
        return rewards

    def _encode(self, messages: Sequence[Mapping[str, str]], answer: str) -> dict[str, list[int]]:
        """Token ids (and types, where the tokenizer has them) of a conversation, by the template if there is one."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            turns = [*map(dict, messages), {"role": "assistant", "content": answer}]
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False)
            except Exception as error:  # a template may raise anything
                raise RunError(
                    f"The chat template of the reward model in {self._folder} refuses a prompt: {first_line(error)}",
                    got=f"roles {', '.join(turn['role'] for turn in turns)}",
                    fix="use a reward model that knows such conversations",
                ) from None
            encoded = tokenizer(text, add_special_tokens=False)
        else:
            encoded = tokenizer("\n\n".join(message["content"] for message in messages), answer)
        ids = encoded["input_ids"]
        opening = int(bool(ids) and ids[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id})
        cut = max(0, len(ids) - self._max_tokens)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        return {name: encoded[name][:opening] + encoded[name][opening + cut :] for name in names}

    def _batch(self, encoded: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Padded on the right; each name to [B, T]."""
        config, sizes = self._model.config, [len(item["input_ids"]) for item in encoded]
        if not self._has_pad:
            # Decoders take the last token that is not padding. One that occurs nowhere cannot be mistaken for it.
            used = {token for item in encoded for token in item["input_ids"]}
            config.pad_token_id = next(token for token in range(len(used) + 1) if token not in used)
        pads = {"input_ids": config.pad_token_id, "token_type_ids": 0}
        longest = max(sizes)
        batch = {
            name: torch.tensor([item[name] + [pads[name]] * (longest - len(item[name])) for item in encoded])
            for name in encoded[0]
        }
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(sizes)[:, None]).long()
        return {name: tensor_BT.to(self._device) for name, tensor_BT in batch.items()}


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"The reward model in {folder} cannot be loaded: {first_line(error)}") from error
    if model.num_labels != 1:
        raise ModelError(
            f"The model in {folder} does not give one reward", got=f"num_labels={model.num_labels}", expected="1"
        )
    if found["missing_keys"]:
        raise ModelError(
            f"The model in {folder} rewards nothing: weights are missing and would be drawn by lot",
            got=", ".join(sorted(found["missing_keys"])[:5]),
            expected="a model that was trained for sequence classification",
        )
    return model.eval()


def _positions(model: Any) -> float:
    """Most tokens that the model has positions for; inf: it has no limit.

    RoBERTa and its kin count positions from the padding's index + 1, so that 514 of them are 512 tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    before = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return limit - max(before, default=0)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"The reward model's tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
