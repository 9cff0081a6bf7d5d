"""An evaluation: which share of its time are the models' own forwards?

    python -m tests.benchmarks.evaluate [--pairs 1000] [--prompts 200] [--hidden 384] [--layers 8] [--tokens 128]

Pairs are prepared, scored and trained on for two steps with a random Llama of 20M parameters; then the whole stage
``evaluate`` runs in this process: held-out pairs under the policy, answers of policy and reference at one temperature,
their log-probs, statistics, report. Measured are the wall time of the stage and, within it, the time in forwards: of
packed rows (model/forward.py, with the vocabulary matrix) and of the model's own class (generation). On a GPU kernels
are waited for at both ends of each forward, so that their time is not counted elsewhere. Loading the models is part of
everything else. Prints a row of a Markdown table; --profile says where everything else is spent.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, parse_config
from dpo_train.model.forward import PackedForward
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_tokenizer, write_pairs

HELDOUT = 0.5


def make(folder: Path, pairs: int, hidden: int, layers: int) -> int:
    """The model and data of which about ``pairs`` are held out; the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_384, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # A few more than wanted: which half a group falls into is chance.
    write_pairs(folder / "pairs.jsonl", int(pairs / HELDOUT * 1.15))
    return int(model.num_parameters())


def config_of(folder: Path, pairs: int, prompts: int, tokens: int) -> RunConfig:
    return parse_config(json.dumps({
        "store": str(folder / "store"), "model": {"path": str(folder / "model")},
        "prepare": {
            "path": str(folder / "pairs.jsonl"), "group_key": "conversation", "heldout_fraction": HELDOUT,
            "max_heldout_pairs": pairs,
        },
        "train": {"max_steps": 2, "batch_pairs": 16, "lora": {"rank": 8, "alpha": 16.0}},
        "evaluate": {"num_prompts": prompts, "max_sample_tokens": tokens, "champion": None},
        "compute": {"executor": "local", "workers": 1, "data_workers": 1},
    }))  # fmt: skip


class Clock:
    """Seconds within the outermost of the forwards that it wraps."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # transformers looks at the parameters of a forward
        def timed(*args: Any, **more: Any) -> Any:
            self._depth += 1
            start = _now()
            try:
                return forward(*args, **more)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += _now() - start
                    self.calls += 1

        return timed

    @contextmanager
    def watching(self, *classes: Any) -> Iterator[None]:
        """Inside, forwards of these classes are timed."""
        originals = [each.forward for each in classes]
        for each in classes:
            each.forward = self.wrap(each.forward)
        try:
            yield
        finally:
            for each, forward in zip(classes, originals, strict=True):
                each.forward = forward


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(config: RunConfig, scored: Artifact, policy: Artifact) -> tuple[float, Clock]:
    """Seconds of the stage, and the clock of its forwards."""
    from transformers import LlamaForCausalLM

    clock = Clock()
    with clock.watching(PackedForward, LlamaForCausalLM):
        start = _now()
        evaluate(config, scored, policy, InProcess())
        return _now() - start, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"pairs": 1000, "prompts": 200, "hidden": 384, "layers": 8, "tokens": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="list what took longest; slows everything down")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpo-benchmark-") as name:
        folder = Path(name)
        parameters = make(folder, arguments.pairs, arguments.hidden, arguments.layers)
        config = config_of(folder, arguments.pairs, arguments.prompts, arguments.tokens)
        scored = score_reference(config, prepare(config, InProcess()), InProcess())
        policy = train(config, scored, InProcess())
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        seconds, clock = measure(config, scored, policy)
        profile.disable()
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print("| model | held-out pairs | prompts | longest answer | stage | in forwards | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {parameters / 1e6:.0f}M | {arguments.pairs} | {arguments.prompts} | {arguments.tokens} tokens "
        f"| {seconds:.1f} s | {clock.seconds:.1f} s ({clock.calls}) | {clock.seconds / seconds:.0%} |"
    )


if __name__ == "__main__":
    main()
