"""What both engines of engine_vs_trl.py train: a Llama of random weights, pairs of given lengths; the work they need.

P: pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from dpo_train.data.pairs import TokenPair

FIRST_ID = 3
"""Ids below are those of the tokenizer's special tokens: an answer must not hold the padding token."""

POPULATION = 512
"""Pairs that a profile's batches are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama whose input embedding is its vocabulary matrix."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of all layers."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def vocabulary_weights(self) -> int:
        return self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(hidden=64, layers=2, intermediate=128, heads=2, kv_heads=1, vocabulary=512),
    # The default. Its vocabulary matrix is 29 % of the weights (Qwen2.5-0.5B: 28 %, SmolLM2-135M and Llama-3.2-1B:
    # 21 %). On CPUs TRL multiplies every token by that matrix and we the answers' alone: a larger share flatters us.
    "22m": Shape(hidden=384, layers=10, intermediate=1024, heads=6, kv_heads=2, vocabulary=16384),
    # 43 % of the weights.
    "38m": Shape(hidden=512, layers=8, intermediate=1376, heads=8, kv_heads=2, vocabulary=32000),
    # As Llama-3.2-1B.
    "1b": Shape(hidden=2048, layers=16, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256),
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Mean tokens of a prompt and of an answer, each log-normal."""

    prompt: int
    answer: int
    prompt_sigma: float = 0.5
    answer_sigma: float = 0.4


PROFILES = {
    "dialogue": Profile(prompt=220, answer=80),
    "summary": Profile(prompt=350, answer=45),
    "long": Profile(prompt=180, answer=330),
}


def write_model(folder: Path, shape: Shape) -> Path:
    """The model and a tokenizer, which TRL wants to see for its padding token; fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tests.tiny import tiny_tokenizer

    disable_progress_bar()
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_batches(profile: Profile, vocabulary: int, *, batch_pairs: int, count: int) -> list[list[TokenPair]]:
    """Batches as TRL's sampler ``group_by_length`` makes them, which pads least: of about one length, longest first.

    The population's lengths are the quantiles of their distributions, prompt and answers independent of each other. It
    is sorted by length and cut into ``count`` equal parts; each batch is a run of neighbours from one part. Of 500 such
    choices the one is taken whose mean lengths come nearest to the population's.
    """
    random = np.random.Generator(np.random.PCG64(1))
    population = max(POPULATION, 4 * count * batch_pairs)
    sizes_P3 = np.stack(
        [
            _lengths(random, population, profile.prompt, profile.prompt_sigma),
            _lengths(random, population, profile.answer, profile.answer_sigma),
            _lengths(random, population, profile.answer, profile.answer_sigma),
        ],
        axis=1,
    )
    sizes_P3 = sizes_P3[np.argsort(-padded_lengths(sizes_P3), kind="stable")]
    wanted, part = sizes_P3.mean(axis=0), population // count
    best, best_error = None, float("inf")
    for _ in range(500):
        starts = [k * part + int(random.integers(0, part - batch_pairs + 1)) for k in range(count)]
        chosen = [sizes_P3[start : start + batch_pairs] for start in starts]
        error = float(np.abs(np.concatenate(chosen).mean(axis=0) / wanted - 1).max())
        if error < best_error:
            best, best_error = chosen, error
    assert best is not None
    return [
        [_pair(random, f"{number}-{index}", sizes, vocabulary) for index, sizes in enumerate(batch)]
        for number, batch in enumerate(best)
    ]


def padded_lengths(sizes_P3: np.ndarray) -> np.ndarray:
    """Tokens of the longer of a pair's two sequences, which is what it pads a batch to."""
    longest: np.ndarray = sizes_P3[:, 0] + sizes_P3[:, 1:].max(axis=1)
    return longest


def needed_flops(pairs: Sequence[TokenPair], shape: Shape) -> float:
    """Floating-point operations of forward and backward that no engine can leave out.

    Each prompt once, the vocabulary matrix for answer tokens alone, attention only where there is something to see. A
    multiplication and addition by each weight forward, two backward; nothing that is computed again counts.
    """
    tokens = sum(pair.num_tokens for pair in pairs)
    answers = sum(len(ids) for pair in pairs for ids in pair.answer_ids)
    visible = 0
    for pair in pairs:
        prompt = len(pair.prompt_ids)
        visible += prompt * (prompt + 1) // 2
        visible += sum(len(ids) * prompt + len(ids) * (len(ids) + 1) // 2 for ids in pair.answer_ids)
    weights = 6.0 * (shape.layer_weights * tokens + shape.vocabulary_weights * answers)
    # Scores and weighted values: two products of a head's size for each visible key, in every head and layer.
    return weights + 12.0 * shape.layers * shape.hidden * visible


def padding(batches: Sequence[Sequence[TokenPair]], micro_pairs: int) -> float:
    """Padding tokens over all tokens, where so many pairs at a time are padded to their longest sequence."""
    held = used = 0
    for batch in batches:
        for start in range(0, len(batch), micro_pairs):
            lengths = [len(p.prompt_ids) + len(ids) for p in batch[start : start + micro_pairs] for ids in p.answer_ids]
            held += max(lengths) * len(lengths)
            used += sum(lengths)
    return 1 - used / held


def _lengths(random: np.random.Generator, count: int, mean: int, sigma: float) -> np.ndarray:
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = np.exp(np.log(mean) - sigma**2 / 2 + sigma * np.array(quantiles))
    return random.permutation(np.maximum(4, np.rint(lengths)).astype(np.int64))


def _pair(random: np.random.Generator, pair_id: str, sizes: np.ndarray, vocabulary: int) -> TokenPair:
    ids = [random.integers(FIRST_ID, vocabulary, size=size).astype(np.int32) for size in sizes]
    return TokenPair(pair_id, *ids)
