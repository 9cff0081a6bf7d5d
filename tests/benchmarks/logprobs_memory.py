"""Peak memory of log-probs by the number of answer tokens: a plain log-softmax against core/logprobs.py.

    .venv/bin/python -m tests.benchmarks.logprobs_memory [--vocabulary 32768] [--hidden 256]

Each measurement is a process of its own: forward and backward by hidden states and vocabulary matrix, memory beyond the
inputs at its highest. The slope is what one more token costs; both are measured side by side in one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from dpo_train.core.logprobs import token_logprobs

TOKENS = (1024, 2048, 4096, 8192)
KINDS = ("plain", "chunked")


def main() -> None:
    """Runs every measurement and prints the table and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, tokens = arguments.measure
        print(json.dumps(measure(kind, int(tokens), arguments.vocabulary, arguments.hidden)))
        return
    sizes = ["--vocabulary", str(arguments.vocabulary), "--hidden", str(arguments.hidden)]
    found: dict[tuple[str, int], dict[str, float]] = {}
    print(f"{'tokens':>8}  {'plain':>20}  {'chunked':>20}")
    for tokens in TOKENS:
        for kind in KINDS:
            command = [sys.executable, "-m", "tests.benchmarks.logprobs_memory", *sizes, "--measure", kind, str(tokens)]
            found[kind, tokens] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        cells = [f"{found[k, tokens]['bytes'] / 1e6:9.0f} MB {found[k, tokens]['seconds']:6.2f} s" for k in KINDS]
        print(f"{tokens:>8}  {cells[0]:>20}  {cells[1]:>20}")
    slopes = {
        kind: (found[kind, TOKENS[-1]]["bytes"] - found[kind, TOKENS[0]]["bytes"]) / (TOKENS[-1] - TOKENS[0])
        for kind in KINDS
    }
    print(
        f"one more token costs {slopes['plain'] / 1e3:.1f} kB plain, {slopes['chunked'] / 1e3:.1f} kB chunked", end=""
    )
    print(
        f" (its fp32 logits alone: {4 * arguments.vocabulary / 1e3:.1f} kB; its state: {4 * arguments.hidden / 1e3} kB)"
    )


def measure(kind: str, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    """Bytes beyond the inputs at the highest, and seconds, of one forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_AD = torch.randn(tokens, hidden, device=device, requires_grad=True)
    weight_VD = torch.randn(vocabulary, hidden, device=device, requires_grad=True)
    targets_A = torch.randint(0, vocabulary, (tokens,), device=device)
    # Threads, buffers and compiled kernels are not what is measured.
    _logprobs(kind, hidden_AD[:8], weight_VD, targets_A[:8]).sum().backward()
    hidden_AD.grad = weight_VD.grad = None
    before = _bytes(device, reset=True)
    start = time.perf_counter()
    _logprobs(kind, hidden_AD, weight_VD, targets_A).sum().backward()
    seconds = time.perf_counter() - start
    return {"bytes": _bytes(device) - before, "seconds": seconds}


def _logprobs(kind: str, hidden_AD: torch.Tensor, weight_VD: torch.Tensor, targets_A: torch.Tensor) -> torch.Tensor:
    if kind == "chunked":
        return token_logprobs(hidden_AD, weight_VD, targets_A)
    return torch.log_softmax((hidden_AD @ weight_VD.T).float(), dim=-1).gather(1, targets_A[:, None]).squeeze(1)


def _bytes(device: str, *, reset: bool = False) -> float:
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in kilobytes


if __name__ == "__main__":
    main()
