"""What bf16 saves on a CPU that has instructions for it: sampling, a training step and scoring, in turn with fp32.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.precision MODEL     # a folder; `make demo` leaves one in demo/assets

Adapters of rank 16 on all linear modules. Times are medians of the turns, one of each kind in either precision a turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from dpo_train.config import LoraConfig, ModelConfig, TrainConfig
from dpo_train.data.folder import model_folder
from dpo_train.data.pairs import TokenPair
from dpo_train.data.tokens import load_tokenizer
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import PROMPTS_SCHEMA
from dpo_train.model.load import load_policy
from dpo_train.model.score import score_pairs
from dpo_train.train.optimizer import build_optimizer
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step

PROMPT, ANSWER, PAIRS, ANSWERS, ROW_TOKENS = 32, 32, 16, 64, 512
"""Tokens of a prompt and an answer; pairs of a step; answers side by side."""


def make_pairs() -> list[TokenPair]:
    """Scored pairs of random tokens."""
    random = np.random.Generator(np.random.PCG64(0))
    pairs = []
    for index in range(PAIRS):
        prompt, chosen, rejected = (random.integers(100, 40_000, n).astype(np.int32) for n in (PROMPT, ANSWER, ANSWER))
        pair = TokenPair(f"{index}", prompt, chosen, rejected)
        logps = np.full(ANSWER, -9.0, np.float32)
        pairs.append(replace(pair, reference_chosen_logps=logps, reference_rejected_logps=logps))
    return pairs


def make_prompts(pairs: Sequence[TokenPair]) -> pa.Table:
    rows = [
        {"pair_id": f"{index}", "prompt_ids": pairs[index % PAIRS].prompt_ids.tolist(), "temperature": 1.0, "index": 0}
        for index in range(ANSWERS)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA)


def works(folder: str, precision: str) -> dict[str, Callable[[], object]]:
    """By its name, what is to be timed."""
    config = ModelConfig(path=folder, precision=precision)  # type: ignore[arg-type]
    policy = load_policy(config, device=torch.device("cpu"), lora=LoraConfig(), trainable=True)
    pairs, fit = make_pairs(), TrainConfig(batch_pairs=PAIRS, row_tokens=ROW_TOKENS)
    optimizer, prompts = build_optimizer(policy.trainable().values(), fit), make_prompts(pairs)
    tokenizer = load_tokenizer(model_folder(folder), trust_remote_code=False)
    sampler = AnswerPrompts(policy, tokenizer, max_tokens=ANSWER, seed=0, batch=ANSWERS)

    def score() -> None:
        with torch.no_grad():
            score_pairs(policy, pairs, ROW_TOKENS)

    return {
        "sampling": lambda: sampler(prompts),
        "training step": lambda: train_step(policy, optimizer, pairs, fit, Ranks(), step=0, learning_rate=1e-6),
        "scoring": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    ways = {precision: works(arguments.model, precision) for precision in ("fp32", "bf16")}
    for name in ways["fp32"]:
        seconds: dict[str, list[float]] = {precision: [] for precision in ways}
        for turn in range(arguments.turns + 1):
            for precision, way in ways.items():
                start = time.perf_counter()
                way[name]()
                seconds[precision] += [time.perf_counter() - start] if turn else []
        fp32, bf16 = (statistics.median(seconds[precision]) for precision in ways)
        print(f"{name:15} fp32 {fp32:6.2f} s   bf16 {bf16:6.2f} s   {fp32 / bf16:.2f} times as fast")


if __name__ == "__main__":
    main()
