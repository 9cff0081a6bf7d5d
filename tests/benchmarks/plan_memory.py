"""What `dpo plan` says of memory against what trainings take on this machine's CPUs.

    .venv/bin/python -m tests.benchmarks.plan_memory [--cases NAME ...]

Each case is a process of its own: it loads a random model, takes two steps of the engine (the first makes the
optimiser's state) and writes a checkpoint. Measured is its anonymous resident memory at the highest, read every 5 ms by
the parent, beyond what it was when everything was imported, and what it has read of the model's mapped file, where
frozen weights stay. glibc keeps freed blocks of less than 32 MB for itself; --glibc measures with that, else blocks of
64 KB and more go back to the system when they are freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_train.config import RunConfig, parse_config
from dpo_train.model.outline import config_of, read_config
from dpo_train.planning.gpus import find_device
from dpo_train.planning.memory import Outline, StageMemory, train_memory
from dpo_train.planning.workload import Workload

SAMPLE_SECONDS = 0.005
SHAPES: dict[str, dict[str, int]] = {
    "13m": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 688, "vocab_size": 16384, "heads": 4},
    "44m": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1376, "vocab_size": 32000, "heads": 8},
    "experts": {
        "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512, "vocab_size": 16384, "heads": 4,
        "num_local_experts": 8,
    },
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152, "heads": 9},
}  # fmt: skip
"""The last is SmolLM2-135M's; the one with experts is a Mixtral. All have the input embedding as their vocabulary
matrix."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training."""

    shape: str
    lora: bool = False
    checkpointing: str = "off"
    row_tokens: int = 1024
    batch_pairs: int = 4
    prompt: int = 172
    answer: int = 42
    optimizer: str = "adamw"

    @property
    def config(self) -> RunConfig:
        """All that the plan needs to know."""
        tree = {
            "model": {"path": "."},
            "prepare": {"path": "pairs.jsonl"},
            "train": {
                "batch_pairs": self.batch_pairs, "row_tokens": self.row_tokens, "optimizer": self.optimizer,
                "max_steps": 2, "lora": {"rank": 16} if self.lora else None,
            },
            "compute": {"activation_checkpointing": self.checkpointing, "compile": "off", "executor": "local"},
        }  # fmt: skip
        return parse_config(json.dumps(tree))

    @property
    def workload(self) -> Workload:
        return Workload(
            train_pairs=1000, validation_pairs=0, heldout_pairs=0, prompt_tokens=self.prompt,
            answer_tokens=self.answer, longest_pair=None, longest_prompt=None, is_even=True, origin="the benchmark",
        )  # fmt: skip


CASES = {
    "all weights, one row": Case(shape="13m"),
    "all weights, four rows": Case(shape="13m", row_tokens=256),
    "all weights, a long row": Case(shape="13m", row_tokens=2048, batch_pairs=8),
    "all weights, selective": Case(shape="13m", checkpointing="selective"),
    "all weights, full": Case(shape="13m", checkpointing="full"),
    "all weights, RMSprop": Case(shape="44m", optimizer="rmsprop", row_tokens=256, batch_pairs=1),
    "all weights, short rows": Case(shape="44m", row_tokens=256, batch_pairs=2),
    "all weights, 135M": Case(shape="135m", row_tokens=256, batch_pairs=1),
    "experts, one row": Case(shape="experts"),
    "experts, four rows": Case(shape="experts", row_tokens=256),
    "experts, full": Case(shape="experts", checkpointing="full"),
    "experts, LoRA": Case(shape="experts", lora=True),
    "experts, LoRA, full": Case(shape="experts", lora=True, checkpointing="full"),
    "LoRA": Case(shape="13m", lora=True),
    "LoRA, selective": Case(shape="13m", lora=True, checkpointing="selective"),
    "LoRA, full": Case(shape="13m", lora=True, checkpointing="full"),
    "LoRA, long answers": Case(shape="13m", lora=True, batch_pairs=2, prompt=100, answer=206),
    "LoRA, 135M": Case(shape="135m", lora=True, row_tokens=256, batch_pairs=1),
}


def main() -> None:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--parts", action="store_true", help="the plan's parts as well")
    parser.add_argument("--glibc", action="store_true", help="with the allocator's own thresholds")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        train(Path(arguments.measure[0]), Case(**json.loads(arguments.measure[1])))
        return
    print(f"{'case':28} {'measured':>10} {'planned':>10} {'ratio':>6}  highest at")
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.cases:
            case = CASES[name]
            folder = write_model(Path(scratch) / case.shape, case.shape)
            planned, measured = plan(folder, case), measure(folder, case, glibc=arguments.glibc)
            ratios.append(planned.total / measured)
            print(
                f"{name:28} {measured / 1e6:7.0f} MB {planned.total / 1e6:7.0f} MB {ratios[-1]:6.2f}  {planned.when}",
                flush=True,
            )
            if arguments.parts:
                print("    ", {part: round(size / 1e6) for part, size in planned.parts.items()})
    print(f"planned / measured: {min(ratios):.2f} to {max(ratios):.2f}")


def plan(folder: Path, case: Case) -> StageMemory:
    """What the plan says."""
    outline = Outline(config=read_config(str(folder)))
    return train_memory(case.config, outline, find_device("cpu"), case.workload, case.config.train)


def measure(folder: Path, case: Case, *, glibc: bool) -> float:
    """Bytes beyond those at the start, at the highest."""
    command = [sys.executable, "-m", "tests.benchmarks.plan_memory", "--measure", str(folder), json.dumps(asdict(case))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if glibc else {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline().strip() == "imported"
    before = peak = _anonymous(process.pid)
    print("go", file=process.stdin, flush=True)
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0, f"the training ended with {process.returncode}"
    return float(peak - before + int(process.stdout.read()))


def _anonymous(pid: int) -> int:
    """Anonymous resident bytes; 0 of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def _mapped(folder: Path) -> int:
    """Bytes of this process that lie in a folder's mapped files and were not written to."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = str(folder) in line
        elif inside and name in {"Rss:", "Anonymous:"}:
            total += int(rest[0]) * 1024 * (1 if name == "Rss:" else -1)
    return total


def write_model(folder: Path, shape: str) -> Path:
    """A random Llama, or Mixtral, unless it is there."""
    if not folder.is_dir():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.manual_seed(0)
        sizes = dict(SHAPES[shape])
        heads = sizes.pop("heads")
        more = {
            "num_attention_heads": heads, "num_key_value_heads": 3 if heads == 9 else heads // 2,
            "tie_word_embeddings": True, "max_position_embeddings": 8192,
        }  # fmt: skip
        config = config_of("mixtral" if "num_local_experts" in sizes else "llama", sizes | more)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def train(folder: Path, case: Case) -> None:
    """The child: says when everything is imported, then trains and saves."""
    import numpy as np
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    from transformers.utils.logging import disable_progress_bar

    from dpo_train.config import ModelConfig
    from dpo_train.data.pairs import TokenPair
    from dpo_train.model.load import load_policy
    from dpo_train.model.transforms import transform_layers
    from dpo_train.train.checkpoint import Checkpoints
    from dpo_train.train.optimizer import build_optimizer
    from dpo_train.train.ranks import Ranks
    from dpo_train.train.state import TrainingState
    from dpo_train.train.step import train_step

    if case.lora:
        import peft  # noqa: F401
    disable_progress_bar()
    print("imported", flush=True)
    sys.stdin.readline()
    config = case.config
    fit: Any = config.train
    policy = load_policy(ModelConfig(path=str(folder)), device=torch.device("cpu"), lora=fit.lora, trainable=True)
    transform_layers(
        policy, checkpointing=config.compute.activation_checkpointing, compile=False, row_tokens=fit.row_tokens
    )
    random = np.random.Generator(np.random.PCG64(0))

    def ids(count: int) -> np.ndarray:
        return random.integers(3, policy.vocabulary, size=count).astype(np.int32)

    zeros = np.zeros(case.answer, np.float32)
    pairs = [
        TokenPair(str(i), ids(case.prompt), ids(case.answer), ids(case.answer), zeros, zeros)
        for i in range(case.batch_pairs)
    ]
    optimizer = build_optimizer(policy.trainable().values(), fit)
    for step in range(2):
        train_step(policy, optimizer, pairs, fit, Ranks(), step=step, learning_rate=1e-6)
    # Experts are stored one by one and put together by loading; what was read of them is cache that nothing refers to.
    copied = sum(p.nbytes for p in policy.model.parameters() if p.ndim == 3)
    print(max(0, _mapped(folder) - copied), flush=True)
    with tempfile.TemporaryDirectory() as home:
        Checkpoints(home, {"of": "the benchmark"}, policy, optimizer, Ranks()).save(TrainingState(step=2), wait=True)


if __name__ == "__main__":
    main()
