"""What the processes of engine_vs_trl.py have found, as a table and as ratios; or that the comparison is void."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from dpo_train.train.speed import PEAK_TFLOPS
from tests.benchmarks.engine_turns import EngineError, Worker
from tests.benchmarks.engine_workload import Shape, needed_flops

OURS, TRL = "tests.benchmarks.engine_ours:run", "tests.benchmarks.engine_trl:run"

LOSS_TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
"""In bf16 an answer's log-prob differs by some 0.4 nats between two layouts of it, a margin at beta 0.1 by 0.04."""

SMALLEST_MOVE = 0.01
"""Losses that stay at ln 2 agree whatever the engines do."""

AIMS = {
    "cpu": {"dialogue": 6.0, "summary": 6.0, "long": 4.0, "memory": 0.5},
    "cuda": {"dialogue": 3.0, "summary": 3.0, "long": 3.0, "memory": 0.5, "mfu": 0.5},
}
"""By profile our pairs/s over TRL's best; our peak memory over that of TRL's fastest; the share of a GPU's peak speed.

The report says whether each was met. Nothing fails where it was not.
"""


class Result:
    """What a worker's steps say."""

    def __init__(self, worker: Worker, warm_ups: int) -> None:
        self.spec, self.losses, self.peak_bytes = worker.spec, worker.steps.losses, worker.peak_bytes
        self.own_bytes = worker.peak_bytes - worker.imported_bytes
        """At the highest, without what the imported packages take."""
        num_pairs, size = len(worker.spec.pairs), len(worker.spec.batches)
        seconds = worker.steps.seconds[warm_ups:]
        rounds = [sum(seconds[start : start + size]) for start in range(0, len(seconds) - size + 1, size)]
        self.rates: list[float] = [num_pairs / each for each in rounds]
        """Pairs per second of each round, which is every batch once."""
        self.reference_seconds = worker.steps.info.get("reference_seconds", 0.0) / num_pairs
        """Per pair; 0 where the step itself scores the reference."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def rate_with_reference(self) -> float:
        seconds: float = 1 / self.rate + self.reference_seconds
        return 1 / seconds


def check_losses(workers: Sequence[Worker], device: str) -> None:
    """Raises EngineError unless all of them compute the same."""
    tolerance = LOSS_TOLERANCE[device]
    first = workers[0]
    for worker in workers:
        losses = worker.steps.losses
        if not abs(losses[0] - math.log(2)) <= tolerance:
            raise EngineError(f"void: the first loss of {worker.spec.name} is {losses[0]:.5f}, not ln 2")
        pairs = list(zip(losses, first.steps.losses, strict=False))
        worst = max(abs(a - b) for a, b in pairs)
        if not worst <= tolerance:
            raise EngineError(
                f"void: {worker.spec.name} and {first.spec.name} differ by {worst:.5f} in some step's loss:\n"
                + "\n".join(f"  {a:.6f}  {b:.6f}" for a, b in pairs)
            )
    if max(abs(loss - math.log(2)) for loss in first.steps.losses) < SMALLEST_MOVE:
        raise EngineError("void: the losses do not move; raise --learning-rate")
    worst = max(abs(a - b) for w in workers for a, b in zip(w.steps.losses, first.steps.losses, strict=False))
    shown = " ".join(f"{loss:.4f}" for loss in first.steps.losses)
    print(f"  losses of the steps, which differ by at most {worst:.1e} between the processes: {shown}")


def report(
    profile: str, results: list[Result], stopped: list[Result], shape: Shape, arguments: argparse.Namespace
) -> dict[str, Any]:
    pairs = results[0].spec.pairs
    tokens = sum(pair.num_tokens for pair in pairs) / len(pairs)
    flops, peak = needed_flops(pairs, shape) / len(pairs), _peak_flops(arguments.device)
    print(f"  {'':<44} {'pairs/s':>8} {'(of rounds)':>15} {'with ref.':>9} {'tokens/s':>9} {'GFLOP/s':>8} "
          f"{'peak MB':>8}" + ("    MFU  (6N)" if peak else ""))  # fmt: skip
    rows = {}
    for result in results:
        spread = f"{min(result.rates):.3g} to {max(result.rates):.3g}"
        line = (f"  {result.spec.name:<44} {result.rate:8.3g} {spread:>15} {result.rate_with_reference:9.3g} "
                f"{result.rate * tokens:9.0f} {result.rate * flops / 1e9:8.1f} "
                f"{result.peak_bytes / 1e6:8.0f}")  # fmt: skip
        rows[result.spec.name] = {
            "pairs_per_second": result.rates, "pairs_per_second_with_reference": result.rate_with_reference,
            "tokens_per_second": result.rate * tokens, "needed_flops_per_second": result.rate * flops,
            "peak_bytes": result.peak_bytes, "own_bytes": result.own_bytes, "losses": result.losses,
        }  # fmt: skip
        if peak:
            # The usual count: 6 for each weight and token of the pairs, the vocabulary matrix at every token.
            usual = 6.0 * (shape.layer_weights + shape.vocabulary_weights) * tokens
            line += f" {result.rate * flops / peak:6.1%} {result.rate * usual / peak:6.1%}"
            rows[result.spec.name]["mfu"] = result.rate * flops / peak
        print(line)
    for result in stopped:
        print(f"  {result.spec.name:<44} slower in its second step; peak {result.peak_bytes / 1e6:.0f} MB")
    ratios = _ratios(profile, results, stopped, flops, peak, arguments.device)
    return {"rows": rows, "ratios": ratios}


def _ratios(
    profile: str, results: list[Result], stopped: list[Result], flops: float, peak: float | None, device: str
) -> dict[str, float]:
    aims = AIMS[device]
    ours = max((r for r in results if r.spec.engine == OURS), key=lambda r: r.rate)
    trl = [r for r in results if r.spec.engine == TRL]
    fastest = max(trl, key=lambda r: r.rate)
    leanest = min((*trl, *(r for r in stopped if r.spec.engine == TRL)), key=lambda r: r.peak_bytes)
    # Round by round: they stood side by side, under the same load.
    by_round = [mine / its for mine, its in zip(ours.rates, fastest.rates, strict=True)]
    found = {
        "pairs_per_second": statistics.median(by_round),
        "pairs_per_second_with_reference": ours.rate_with_reference / max(r.rate_with_reference for r in trl),
        "memory_beside_the_fastest": ours.peak_bytes / fastest.peak_bytes,
        "memory_beside_the_leanest": ours.peak_bytes / leanest.peak_bytes,
        "own_memory_beside_the_fastest": ours.own_bytes / fastest.own_bytes,
    }
    speed, with_reference = found["pairs_per_second"], found["pairs_per_second_with_reference"]
    memory = found["memory_beside_the_fastest"]
    print(f"  pairs/s, ours / TRL's best: {speed:.2f} ({min(by_round):.2f} to {max(by_round):.2f} by rounds), with the "
          f"reference {with_reference:.2f}; aim {aims[profile]:g}: {_met(speed >= aims[profile])}")  # fmt: skip
    print(f"  peak memory, ours / TRL's: {memory:.2f} of its fastest, {found['memory_beside_the_leanest']:.2f} of its "
          f"leanest ({leanest.spec.name}), {found['own_memory_beside_the_fastest']:.2f} of its fastest without what "
          f"imports take; aim {aims['memory']:g}: {_met(memory <= aims['memory'])}")  # fmt: skip
    if peak:
        found["mfu"] = ours.rate * flops / peak
        print(f"  MFU {found['mfu']:.1%}; aim {aims['mfu']:.0%}: {_met(found['mfu'] >= aims['mfu'])}")
    return found


def _peak_flops(device: str) -> float | None:
    if device != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name()
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def _met(is_met: bool) -> str:
    return "met" if is_met else "not met"
