"""Prompts to sampled answers of one model, many at a time.

An answer is an exact sample of softmax(logits / temperature): nothing of the model's own generation settings (top-k,
penalties, forced tokens) but its end tokens is used, because the KL is estimated from these answers. The randomness of
each depends on (seed, pair_id, temperature, index) alone and not on what is sampled beside it. Two models that are
asked the same get the same noise, so that they say the same unless they differ: comparisons of them vary less.

B: answers sampled side by side, W: those of them that are not greedy, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo_train.evaluate.samples import ANSWERS_SCHEMA
from dpo_train.model.load import Policy
from dpo_train.model.shard import reshard


class AnswerPrompts:
    """PROMPTS_SCHEMA to ANSWERS_SCHEMA, row by row in the same order, by one model.

    It replaces the model's generation config.

    Args:
        policy: the model.
        tokenizer: for the answers' text.
        max_tokens: longest answer, its end token counted. Where the model has no more positions it is shorter.
        seed: of all answers.
        batch: most answers that are sampled side by side.
        end_ids: tokens that end an answer, besides the tokenizer's and those of the model's generation config.
        continues: whether an answer goes on from its prompt's text (``prepare.template=plain``): then the white space
            that it begins with is part of it. An answer that is a turn of its own is shown without.
        most: see ``score_pairs``.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        max_tokens: int,
        seed: int,
        batch: int,
        end_ids: Sequence[int] = (),
        continues: bool = False,
        most: Callable[[float], float] = float,
    ) -> None:
        self._policy, self._tokenizer, self._most = policy, tokenizer, most
        self._max_tokens, self._seed, self._batch, self._continues = max_tokens, seed, batch, continues
        self._positions: int | None = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
        own = policy.model.generation_config.eos_token_id
        self._end_ids = sorted(
            {tokenizer.eos_token_id, *end_ids, *(own if isinstance(own, list) else [] if own is None else [own])}
        )
        # What `generate` is not told it takes from here.
        policy.model.generation_config = type(policy.model.generation_config)()
        self._known = set(tokenizer.get_vocab().values())

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        found: dict[int, dict[str, Any]] = {}
        batches = list(self._batches(rows))
        for number in range(int(self._most(len(batches)))):
            places, room = batches[min(number, len(batches) - 1)]
            # Ranks that hold the model together all go on until the last of them is done.
            max_tokens = -int(self._most(-room))
            ids = self._sample([rows[place] for place in places], max_tokens)
            prompts = (rows[place]["prompt_ids"] for place in places)
            found |= dict(zip(places, map(self._answer, ids, prompts), strict=True))
        keys = ("pair_id", "temperature", "index")
        answers = [{**{key: row[key] for key in keys}, **found[place]} for place, row in enumerate(rows)]
        return pa.Table.from_pylist(answers, schema=ANSWERS_SCHEMA)

    def _batches(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[int], int]]:
        """Places of rows to sample side by side, with their longest answer: prompts of similar length together."""
        lengths = [len(row["prompt_ids"]) for row in rows]
        rooms = [self._room(length) for length in lengths]
        ordered = sorted(range(len(rows)), key=lambda place: (rooms[place], lengths[place]), reverse=True)
        for room, group in itertools.groupby(ordered, key=rooms.__getitem__):
            places = list(group)
            for start in range(0, len(places), self._batch):
                yield places[start : start + self._batch], room

    def _room(self, prompt_length: int) -> int:
        """Longest answer to a prompt: its last token needs no position."""
        if self._positions is None:
            return self._max_tokens
        return min(self._max_tokens, max(1, self._positions - prompt_length + 1))

    @torch.no_grad()
    def _sample(self, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[list[int]]:
        model, device = self._policy.model, self._policy.device
        width = max(len(row["prompt_ids"]) for row in rows)
        ids_BT = torch.full((len(rows), width), self._end_ids[0])
        mask_BT = torch.zeros_like(ids_BT)
        for place, row in enumerate(rows):
            start = width - len(row["prompt_ids"])
            ids_BT[place, start:] = torch.tensor(row["prompt_ids"])
            mask_BT[place, start:] = 1
        options = type(model.generation_config)(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=self._end_ids, pad_token_id=self._end_ids[0]
        )
        seeds = [_seed(self._seed, row) for row in rows]
        choice = _Choice([row["temperature"] for row in rows], seeds, device)
        with self._policy.autocast(), _gathered(self._policy), _contiguous_hidden_states(model):
            output_BT = model.generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=options,
                logits_processor=[choice],
                # Ranks that hold the model together go on until all of them are done.
                synced_gpus=self._policy.sharded,
            )
        return [self._until_end(ids) for ids in output_BT[:, width:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        """Without the padding that follows the end token."""
        ends = set(self._end_ids)
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]

    def _answer(self, ids: list[int], prompt_ids: Sequence[int]) -> dict[str, Any]:
        truncated = ids[-1] not in self._end_ids
        # The vocabulary matrix may have more rows than the tokenizer has tokens.
        text_ids = [token for token in (ids if truncated else ids[:-1]) if token in self._known]
        text = self._behind(prompt_ids[-1], text_ids) if self._continues else self._text(text_ids).strip()
        return {"answer_ids": ids, "answer": text, "truncated": truncated}

    def _behind(self, last: int, ids: list[int]) -> str:
        """The text as it stands behind the prompt's last token: by themselves some tokenizers drop its first blank."""
        before = self._text([last])
        both = self._text([last, *ids])
        return both[len(before) :] if both.startswith(before) else self._text(ids)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def _gathered(policy: Policy) -> Iterator[None]:
    """Inside, the weights of a sharded policy that belong to no layer are whole: `generate` does not go through
    ``policy.packed``, which would gather them."""
    if policy.sharded:
        root: Any = policy.packed
        root.unshard()
    try:
        yield
    finally:
        reshard(policy)


@contextmanager
def _contiguous_hidden_states(model: Any) -> Iterator[None]:
    """Of the prompts, `generate` has logits made from a slice, the last position's. Frozen weights are then multiplied
    once an answer: on CPUs 0.5 s for 64 answers and a vocabulary of 49,152, and 8 s in bf16, which copies them first.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


class _Choice:
    """Scores of which `generate` takes the largest: the logits themselves, or an exact sample at a temperature.

    The largest p / E, with E exponential, is at each token with its probability p (the Gumbel-max trick without its
    logarithms).
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int], device: torch.device) -> None:
        self._warm = [place for place, temperature in enumerate(temperatures) if temperature > 0]
        self._temperatures_W1 = torch.tensor([[temperatures[place]] for place in self._warm], device=device)
        self._draw = [_noise(seeds[place], device) for place in self._warm]

    def __call__(self, input_ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        if not self._warm:
            return logits_BV
        are_all_warm = len(self._warm) == len(logits_BV)
        scores_WV = torch.softmax(
            (logits_BV if are_all_warm else logits_BV[self._warm]) / self._temperatures_W1, dim=-1
        )
        for draw, scores_V in zip(self._draw, scores_WV, strict=True):
            scores_V.div_(draw(len(scores_V)).float())
        if are_all_warm:
            return scores_WV
        scores_BV = logits_BV.clone()
        scores_BV[self._warm] = scores_WV
        return scores_BV


def _noise(seed: int, device: torch.device) -> Callable[[int], Tensor]:
    """Draws so many independent exponentials, float64, others each time.

    Of fp32's some would be 0, and a token of no probability be taken. NumPy draws them five times as fast as torch on
    CPUs; on a GPU it would take as long as the model (4 ns a number, for 32 answers and 150,000 tokens 20 ms).
    """
    if device.type == "cuda":
        on_device = torch.Generator(device).manual_seed(seed)
        return lambda size: torch.empty(size, dtype=torch.float64, device=device).exponential_(generator=on_device)
    generator = np.random.Generator(np.random.PCG64(seed))
    return lambda size: torch.from_numpy(generator.standard_exponential(size))


def _seed(seed: int, row: Mapping[str, Any]) -> int:
    """Of one answer, 63 bits."""
    text = f"{seed} {row['pair_id']} {float(row['temperature'])!r} {row['index']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
