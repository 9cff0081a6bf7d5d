"""Scoring the reference: the stage on Ray Data beside a bare loop of forwards over the same rows.

    python -m tests.benchmarks.score [--pairs 3000] [--hidden 256] [--layers 4]

Both score the same pairs with the same random model, packed into the same rows, on the same number of threads. The
stage's time counts from its first finished unit to its last, so that neither side pays for starting and loading; what
starting costs is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from dpo_train.config import RunConfig, parse_config
from tests.tiny import tiny_tokenizer, write_pairs


def make(folder: Path, pairs: int, hidden: int, layers: int) -> None:
    """A random Llama, large enough for its forward to matter, and data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", pairs)


def config_of(folder: Path) -> RunConfig:
    text = json.dumps({
        "store": str(folder / "store"), "model": {"path": str(folder / "model")},
        "prepare": {"path": str(folder / "pairs.jsonl")}, "score": {"row_tokens": 1024},
        "compute": {"data_workers": 1, "device": "cpu", "executor": "ray"},
    })  # fmt: skip
    return parse_config(text)


def staged(folder: Path) -> dict[str, float]:
    """Pairs per second of the stage, by its own progress events."""
    from dpo_train import launch
    from dpo_train.progress import ENVIRONMENT_KEY, Follower
    from dpo_train.runtime.executor import RayExecutor
    from dpo_train.stages import prepare, score_reference
    from dpo_train.stages.executor import InProcess

    config = config_of(folder)
    pairs = prepare(config, InProcess())
    os.environ[ENVIRONMENT_KEY] = str(folder / "events.jsonl")
    with launch.session(config):
        start = time.time()
        made = score_reference(config, pairs, RayExecutor(config.compute))
    seen = [e for e in Follower(folder / "events.jsonl").new() if e["kind"] == "progress" and e["done"]]
    first, last = seen[0], seen[-1]
    rate = (last["done"] - first["done"]) / (last["time"] - first["time"])
    return {"pairs_per_second": rate, "starting": first["time"] - start, "pairs": made.record.counts["pairs"]}


def bare(folder: Path) -> dict[str, float]:
    """The same units by the forward alone."""
    import torch

    from dpo_train.artifacts import open_artifact
    from dpo_train.data.packing import pack
    from dpo_train.data.pairs import SPLITS, token_pairs
    from dpo_train.data.shards import TOKENS, Split, lengths
    from dpo_train.model.load import load_policy
    from dpo_train.model.rows import build_row
    from dpo_train.model.score import row_logps
    from dpo_train.stages.score_reference import unit_pairs

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = config_of(folder)
    (home,) = (folder / "store" / "prepare").glob("*/record.json")
    artifact = open_artifact(home.parent)
    policy = load_policy(config.model, device=torch.device("cpu"))
    tables = [Split(artifact, split).table(TOKENS) for split in SPLITS]
    size = unit_pairs(sum(map(len, tables)))
    rows = []
    for table in tables:
        order = (-lengths(table)).argsort(kind="stable")
        for start in range(0, len(order), size):
            unit = token_pairs(table.take(pa.array(order[start : start + size])))
            rows += [
                build_row([unit[i] for i in members])
                for members in pack([pair.num_tokens for pair in unit], config.score.row_tokens)
            ]
    start_time = time.perf_counter()
    with torch.no_grad():
        for row in rows:
            row_logps(policy, row)
    seconds = time.perf_counter() - start_time
    return {"pairs_per_second": sum(map(len, tables)) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, folder = arguments.measure
        print(json.dumps((staged if kind == "staged" else bare)(Path(folder))))
        return
    with tempfile.TemporaryDirectory(prefix="dpo-benchmark-") as name:
        make(Path(name), arguments.pairs, arguments.hidden, arguments.layers)
        found = {}
        for kind in ("staged", "bare"):
            command = [sys.executable, "-m", "tests.benchmarks.score", "--measure", kind, name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found[kind] = json.loads(output.strip().splitlines()[-1])
            print(kind, {key: round(value, 2) for key, value in found[kind].items()}, flush=True)
        ratio = found["staged"]["pairs_per_second"] / found["bare"]["pairs_per_second"]
        print(f"the stage does {ratio:.0%} of the bare loop's pairs per second")


if __name__ == "__main__":
    main()
