"""What long rows and large batches cost.

    python -m tests.benchmarks.rows time       # one row of 4,096 tokens beside four of 1,024 with the same pairs
    python -m tests.benchmarks.rows memory     # peak memory of a step over its batch, and with activation checkpointing

A random Llama (hidden 512, 8 layers, vocabulary 8,192), all weights trained, AdamW. Times are medians of steps taken in
turn; memory is the anonymous memory that a process of its own adds from before its first step to its peak.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.core.attention import shared_prompt_mask
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy, load_policy
from dpo_train.model.transforms import transform_layers
from dpo_train.train.optimizer import build_optimizer
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step

VOCABULARY = 8192
LENGTHS = [(100, 60, 60), (150, 40, 66), (90, 100, 78), (160, 60, 60)]
"""1,024 tokens."""


def write_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Policy:
    return load_policy(ModelConfig(path=str(folder)), device=torch.device("cpu"), trainable=True)


def make_pairs(count: int) -> list[TokenPair]:
    """Scored pairs; of every four the lengths are LENGTHS."""
    random = np.random.Generator(np.random.PCG64(0))
    pairs = []
    for index in range(count):
        prompt, chosen, rejected = (random.integers(0, VOCABULARY, n).astype(np.int32) for n in LENGTHS[index % 4])
        reference = [np.full(len(answer), -9.0, np.float32) for answer in (chosen, rejected)]
        pair = TokenPair(f"{index}", prompt, chosen, rejected)
        pairs.append(replace(pair, reference_chosen_logps=reference[0], reference_rejected_logps=reference[1]))
    return pairs


def stepper(policy: Policy, pairs: Sequence[TokenPair], row_tokens: int) -> Callable[[], object]:
    config = TrainConfig(batch_pairs=len(pairs), row_tokens=row_tokens)
    optimizer = build_optimizer(policy.trainable().values(), config)
    return lambda: train_step(policy, optimizer, pairs, config, Ranks(), step=0, learning_rate=1e-6)


def compare(folder: Path, turns: int) -> None:
    """Seconds of one step over 16 pairs, laid out in two ways, and in long rows under a dense mask."""
    policy, dense, pairs = load(folder), load(folder), make_pairs(16)
    dense.packed._layout = _Dense()  # type: ignore[assignment]
    steps = {
        "four rows of 1,024": stepper(policy, pairs, 1024),
        "one row of 4,096": stepper(policy, pairs, 4096),
        "one row of 4,096, dense mask": stepper(dense, pairs, 4096),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - start] if turn else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = medians["four rows of 1,024"]
    for name, median in medians.items():
        print(f"{name:30} {median:6.2f} s  {median / first:5.2f}")


class _Dense:
    """A layout that hands out dense masks, as before attention per pair."""

    def __getattr__(self, name: str) -> Any:
        return {"experts": None}.get(name) if name != "transform" else _identity()

    def masks(self, row: Any) -> torch.Tensor:
        return shared_prompt_mask(row.pair_T, row.part_T, row.positions_T)


def _identity() -> Any:
    from dpo_train.core.logprobs import IDENTITY

    return IDENTITY


def measure(folder: Path, pairs: int, checkpointing: Literal["off", "selective", "full"]) -> None:
    """Prints the MB that steps add to what model, gradients and optimiser hold."""
    policy = load(folder)
    transform_layers(policy, checkpointing=checkpointing, compile=False, row_tokens=1024)
    stepper(policy, make_pairs(1), 1024)()  # what stays: gradients, kernels
    before = anonymous_mb()
    step = stepper(policy, make_pairs(pairs), 1024)
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    stop.set()
    watcher.join()
    print(f"{peak - before:.0f}")


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split("RssAnon:")[1].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "measure"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--checkpointing", default="off")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments.folder, arguments.pairs, arguments.checkpointing)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model")
        if arguments.what == "time":
            compare(folder, arguments.turns)
            return
        for pairs, checkpointing in ((8, "off"), (32, "off"), (128, "off"), (32, "selective"), (32, "full")):
            options = ["--folder", str(folder), "--pairs", str(pairs), "--checkpointing", checkpointing]
            command = [sys.executable, "-m", "tests.benchmarks.rows", "measure", *options]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            print(f"{pairs:4} pairs in rows of 1,024, checkpointing {checkpointing:10} {found:>6} MB")


if __name__ == "__main__":
    main()
