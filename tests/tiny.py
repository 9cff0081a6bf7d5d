"""A model, preference data and a config so small that a whole run takes seconds, made by code, with no network.

tiny_model(folder) -> a random Llama with its tokenizer, in the Hugging Face layout
write_pairs(file)  -> JSONL records whose preference the tiny model can learn in some 20 steps
tiny_config(folder)-> a RunConfig for both, which are made in the folder if they are not there yet
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch

from dpo_train.config import LoraConfig, ModelConfig, RunConfig, parse_config
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy, load_policy
from dpo_train.model.score import score_pairs

TOPICS = ("cat", "dog", "sun", "sea", "hill", "road", "song", "book", "lamp", "tree", "bird", "rain")
GOOD = ("kind", "warm", "bright", "calm", "sweet", "fair", "glad", "brave")
BAD = ("rude", "cold", "dull", "grim", "sour", "mean", "sad", "weak")

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Writes a random Llama (2 layers, hidden size 32) with its tokenizer; the same seed gives the same bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # At the usual 0.02 a hidden size of 32 gives all but equal logits, and nothing is learned within a few steps.
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(**changes: Any) -> Any:
    """A byte-level BPE that reads any text and knows the words of ``write_pairs``, as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [*TOPICS, *GOOD, *BAD, "user", "assistant", "question", "tell", "me", "about", "the", "it", "is", "and"]
    backend.train_from_iterator([f"{word} {word}" for word in words for _ in range(2)], trainer)
    return PreTrainedTokenizerFast(
        **{
            "tokenizer_object": backend,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            **changes,
        }
    )


def write_pairs(path: Path, count: int = 200, *, seed: int = 0, shuffle_labels: bool = False) -> Path:
    """Writes ``count`` different records, two to a conversation; chosen answers use GOOD words, rejected BAD ones.

    With ``shuffle_labels`` a fair coin swaps chosen and rejected, so that there is nothing to learn.
    """
    random = Random(seed)
    lines = []
    for index in range(count):
        topics = " and ".join(random.sample(TOPICS, 2))
        prompt = f"question {index}: tell me about the {topics}"
        answers = [_answer(random, GOOD), _answer(random, BAD)]
        if shuffle_labels and random.random() < 0.5:
            answers.reverse()
        record = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": answers[0],
            "rejected": answers[1],
            "conversation": f"c{index // 2}",
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _answer(random: Random, words: Sequence[str]) -> str:
    return f"it is {' and '.join(random.sample(words, random.randint(1, 3)))}"


def tiny_config(folder: Path, **overrides: Any) -> RunConfig:
    """A config for ``folder/model`` and ``folder/pairs.jsonl``, which are made if they are missing.

    An override names its key with a dot or two underscores: ``tiny_config(folder, train__beta=0.2)``.
    """
    if not (folder / "model").is_dir():
        tiny_model(folder / "model")
    if not (folder / "pairs.jsonl").is_file():
        write_pairs(folder / "pairs.jsonl")
    tree = {
        "store": str(folder / "store"),
        "model": {"path": str(folder / "model")},
        "prepare": {
            "path": str(folder / "pairs.jsonl"),
            "group_key": "conversation",
            "validation_fraction": 0.15,
            "heldout_fraction": 0.25,
            "max_prompt_tokens": 64,
            "max_answer_tokens": 32,
        },
        "score": {"row_tokens": 256},
        "train": {
            "learning_rate": 5e-3,
            "schedule": "constant",
            "warmup_steps": 2,
            "batch_pairs": 16,
            "max_steps": 20,
            "epochs": 4,
            "row_tokens": 256,
            "checkpoint_steps": 5,
            "evaluate_steps": 10,
            "lora": {"rank": 4, "alpha": 8.0},
        },
        "evaluate": {"num_prompts": 4, "max_sample_tokens": 8, "min_heldout_pairs": 20, "row_tokens": 256},
        "compute": {"executor": "local", "workers": 1, "data_workers": 1},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    assignments = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return parse_config(json.dumps(tree), assignments, origin="the tiny config")


def tiny_policy(
    folder: Path,
    *,
    lora: bool = True,
    trainable: bool = True,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Policy:
    """The policy of a ``tiny_model`` folder on the CPU, with rank-4 adapters or (lora=False) with all weights."""
    return load_policy(
        ModelConfig(path=str(folder), precision=precision),
        device=torch.device("cpu"),
        lora=LoraConfig(rank=4, alpha=8.0) if lora else None,
        trainable=trainable,
        seed=seed,
    )


def random_pairs(count: int, *, seed: int = 0, vocabulary: int = 300) -> list[TokenPair]:
    """Token pairs of random ids: prompts of 1 to 9 tokens, answers of 1 to 7."""
    random = np.random.Generator(np.random.PCG64(seed))

    def ids(most: int) -> np.ndarray:
        return random.integers(3, vocabulary, size=random.integers(1, most + 1)).astype(np.int32)

    return [TokenPair(f"pair-{index}", ids(9), ids(7), ids(7)) for index in range(count)]


def random_rankings(count: int, *, most: int = 5, seed: int = 0, vocabulary: int = 300) -> list[TokenPair]:
    """The same with 2, 3, ... ``most`` answers in turn, the pairs being those of ``random_pairs``."""
    random = np.random.Generator(np.random.PCG64(seed + 1))
    rankings = []
    for index, pair in enumerate(random_pairs(count, seed=seed, vocabulary=vocabulary)):
        sizes = random.integers(1, 8, size=index % (most - 1))
        others = (random.integers(3, vocabulary, size=size).astype(np.int32) for size in sizes)
        rankings.append(replace(pair, other_ids=tuple(others)))
    return rankings


def with_reference(policy: Policy, pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """The pairs with this policy's own log-probs as their reference."""
    scores = score_pairs(policy, pairs, 64)
    return [
        replace(
            pair, reference_chosen_logps=chosen, reference_rejected_logps=rejected, reference_other_logps=tuple(others)
        )
        for pair, (chosen, rejected, *others) in zip(pairs, scores, strict=True)
    ]
