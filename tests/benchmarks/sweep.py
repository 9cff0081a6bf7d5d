"""A sweep: how many trainings does it cost, and does halving choose the same beta?

    python -m tests.benchmarks.sweep [--pairs 6000] [--steps 400] [--hidden 64] [--layers 2] [--noise 0.2]

Pairs, of which some have their answers swapped, are prepared and scored; then one training, a sweep of eight betas that
all go to the end, and one with halving run in this process, each into a store of its own. A training is the whole stage
``train``, a sweep the whole stage ``sweep``: loading, validation pairs, samples, KL, choice, pictures. Costs are in
seconds of CPU, which other programs on the machine change less than the clock; the clock's stand beside them. Prints a
Markdown table, and below each sweep what it found of every beta.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, parse_config
from dpo_train.stages import prepare, score_reference, sweep, train
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_tokenizer, write_pairs

BETAS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def make(folder: Path, pairs: int, noise: float, hidden: int, layers: int) -> None:
    """Model and data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = write_pairs(folder / "pairs.jsonl", pairs)
    random, lines = Random(0), []
    for record in map(json.loads, data.read_text().splitlines()):
        swapped = {**record, "chosen": record["rejected"], "rejected": record["chosen"]}
        lines.append(json.dumps(swapped if random.random() < noise else record) + "\n")
    data.write_text("".join(lines))


def config_of(folder: Path, steps: int, **swept: Any) -> RunConfig:
    return parse_config(json.dumps({
        "store": str(folder / "store"), "model": {"path": str(folder / "model")},
        "prepare": {
            "path": str(folder / "pairs.jsonl"), "group_key": "conversation", "validation_fraction": 0.1,
            "heldout_fraction": 0.1,
        },
        "train": {
            "max_steps": steps, "epochs": 100, "batch_pairs": 32, "learning_rate": 3e-4, "schedule": "cosine",
            "evaluate_steps": steps,
        },
        "evaluate": {"max_sample_tokens": 32},
        "sweep": {"betas": BETAS, "use": "policy", **swept},
        "compute": {"executor": "local", "workers": 1, "data_workers": 1},
    }))  # fmt: skip


def timed(work: Callable[[], Artifact]) -> tuple[Artifact, float, float]:
    """What was made, the seconds of CPU and those of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    made = work()
    return made, time.process_time() - cpu, time.perf_counter() - clock


def train_alone(config: RunConfig, scored: Artifact, store: Path) -> tuple[float, float]:
    """Seconds of CPU and of the clock of one training in a store of its own."""
    alone = dataclasses.replace(config, store=str(store))
    return timed(functools.partial(train, alone, scored, InProcess()))[1:]


def show_trials(made: Artifact) -> None:
    """What was found of each beta."""
    for trial in json.loads((made.path / "trials.json").read_text())["trials"]:
        found = trial["accuracy"] or (trial["points"][-1]["accuracy"] if trial["points"] else None)
        kl = f", KL {trial['kl']['value']:.2f}" if trial["kl"] else ""
        shown = "failed" if found is None else f"accuracy {found['value']:.3f}"
        stopped = f", stopped {trial['stopped']}" if trial["stopped"] else ""
        print(f"  {trial['name']}: {shown}{kl}{stopped}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"pairs": 6000, "steps": 400, "hidden": 64, "layers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.2, help="share of swapped answers")
    arguments = parser.parse_args()
    # Threads that wait for each other on a busy machine burn CPU that no training asked for.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dpo-benchmark-") as name:
        folder = Path(name)
        make(folder, arguments.pairs, arguments.noise, arguments.hidden, arguments.layers)
        config = config_of(folder, arguments.steps)
        scored = score_reference(config, prepare(config, InProcess()), InProcess())
        # Imports are nobody's cost.
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=1)), scored, InProcess())
        print("| | trials | seconds of CPU | trainings | seconds | beta |\n| --- | --- | --- | --- | --- | --- |")
        for label, halving in {"halving": 2, "all to the end": None}.items():
            swept = config_of(folder, arguments.steps, halving=halving)
            swept = dataclasses.replace(swept, store=str(folder / label))
            # One training before the sweep and one after it: a machine that gets busier makes both dearer.
            one, clock = train_alone(config, scored, folder / f"before {label}")
            made, cpu, sweep_clock = timed(functools.partial(sweep, swept, scored, InProcess()))
            again, clock_again = train_alone(config, scored, folder / f"after {label}")
            one, clock = (one + again) / 2, (clock + clock_again) / 2
            trials, beta = made.record.counts["trials"], made.record.details["beta"]
            print(f"| one training of {arguments.steps} steps | 1 | {one:.1f} | 1 | {clock:.1f} | |")
            print(f"| {label} | {trials} | {cpu:.1f} | {cpu / one:.2f} | {sweep_clock:.1f} | {beta:g} |", flush=True)
            show_trials(made)


if __name__ == "__main__":
    main()
