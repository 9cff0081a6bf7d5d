"""A DPO training step: our engine beside TRL's DPOTrainer, same weights, pairs, precision, optimiser and losses.

    python -m tests.benchmarks.engine_vs_trl                     # three length profiles, on two cores some 7 minutes
    python -m tests.benchmarks.engine_vs_trl --breakdown         # where one of our steps spends its time
    python -m tests.benchmarks.engine_vs_trl --ablation          # the price of each technique, left out alone
    python -m tests.benchmarks.engine_vs_trl --device cuda --params 1b --row-tokens 16384 --compile     # never run yet

Each engine with each of its options is a process of its own (engine_turns.py). On CPUs they take steps in turns, so
that what else the machine does hits all of them; on GPUs they run one after the other. TRL's pairs per device are tried
out, each with a warm-up and one step, and the fastest goes on, with the reference precomputed and with a reference
model in the step. Batches are such as TRL's own grouping by length makes (engine_workload.py). The first step of each
process is a warm-up. Losses are compared step by step: a first step that is not ln 2, a loss that differs from ours, or
losses that do not move end the run, for then the engines do not do the same.

"with ref." adds what scoring the pairs once by the reference took. Tokens are those of the pairs, each prompt once, for
both engines. GFLOP are those that no engine can leave out (engine_workload.py): on GPUs they give the MFU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_train.data.pairs import TokenPair
from tests.benchmarks.engine_ablations import DESCRIPTIONS
from tests.benchmarks.engine_breakdown import PARTS
from tests.benchmarks.engine_report import OURS, TRL, Result, check_losses, report
from tests.benchmarks.engine_turns import EngineError, Spec, Worker, start
from tests.benchmarks.engine_workload import PROFILES, SHAPES, Shape, make_batches, padding, write_model


def main() -> None:
    arguments = _parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the scratch folder go too
    shape = SHAPES[arguments.params]
    print(_machine(arguments, shape), flush=True)
    with tempfile.TemporaryDirectory(prefix="dpo-engines-") as name:
        model = write_model(Path(name) / "model", shape)
        found = {}
        for profile in arguments.profiles:
            batches = make_batches(
                PROFILES[profile], shape.vocabulary, batch_pairs=arguments.batch_pairs, count=arguments.batches
            )
            scratch = Path(name) / profile
            scratch.mkdir()
            base = Spec(
                name="ours", engine=OURS, model=model, batches=tuple(map(tuple, batches)), device=arguments.device,
                cpu_time=arguments.cpu_time, scratch=scratch, learning_rate=arguments.learning_rate,
                row_tokens=arguments.row_tokens[0], compiled=arguments.compile,
            )  # fmt: skip
            print(f"\n{profile}: {_lengths(base.pairs)}", flush=True)
            do = break_down if arguments.breakdown else ablate if arguments.ablation else compare
            try:
                found[profile] = do(profile, base, shape, arguments)
            except EngineError as error:
                sys.exit(str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(profile: str, base: Spec, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """The table of one profile, and the ratios."""
    ours = [
        replace(base, name=f"ours, rows of {tokens}", row_tokens=tokens) for tokens in sorted(set(arguments.row_tokens))
    ]
    trl = _trl_specs(base, arguments)
    waste = ", ".join(f"{size}: {padding(base.batches, size):.0%}" for size in sorted(arguments.trl_batch))
    print(f"  TRL's padding by pairs per device: {waste}")
    on_cpu = arguments.device == "cpu"
    finished, failed = (_together if on_cpu else _apart)(ours, trl, arguments)
    check_losses(finished, arguments.device)
    warm_ups = _warm_ups(base)
    results = [Result(worker, warm_ups) for worker in finished]
    for line in failed:
        print(f"  {line}")
    whole = [result for result in results if len(result.rates) == arguments.rounds]
    stopped = [result for result in results if result not in whole]
    return report(profile, whole, stopped, shape, arguments)


def _trl_specs(base: Spec, arguments: argparse.Namespace) -> list[Spec]:
    """The reference precomputed, for each number of pairs per device, plain and with what speeds TRL up."""
    plain = replace(base, engine=TRL, compiled=False, row_tokens=0)
    specs = [replace(plain, name=f"TRL, {size} a device", micro_pairs=size) for size in arguments.trl_batch]
    if arguments.compile:
        specs += [replace(s, name=f"{s.name}, torch_compile", compiled=True) for s in specs]
    if arguments.device == "cpu":
        print("  TRL with Liger: left out, its kernels need a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        print("  TRL with Liger: left out, liger-kernel is not installed")
    else:
        specs += [replace(s, name=f"{s.name}, Liger", liger=True) for s in specs if not s.compiled]
    return specs


def _others(ours: Spec, trl: Spec, arguments: argparse.Namespace) -> list[Spec]:
    """What else is measured at each engine's fastest size."""
    others = [replace(trl, name=f"{trl.name}, reference in the step", precomputed=False)]
    if arguments.checkpointing:
        smallest = min(arguments.trl_batch)
        others += [
            replace(ours, name=f"{ours.name}, checkpointing", checkpointing=True),
            replace(trl, name=f"TRL, {smallest} a device, checkpointing", micro_pairs=smallest, checkpointing=True),
        ]
    return others


def _together(ours: list[Spec], trl: list[Spec], arguments: argparse.Namespace) -> tuple[list[Worker], list[str]]:
    """All processes at once, in turns; after the second step of each the slower sizes stop."""
    workers = [Worker(spec) for spec in (*ours, *trl)]
    try:
        start(workers)
        for _ in range(2):
            for worker in workers:
                worker.step()
        mine, theirs = workers[: len(ours)], workers[len(ours) :]
        going = [min(side, key=lambda w: w.steps.seconds[1]) for side in (mine, theirs)]
        for worker in workers:
            if worker not in going:
                worker.stop()
        later = [Worker(spec) for spec in _others(going[0].spec, going[1].spec, arguments)]
        workers += later
        start(later)
        for worker in later:
            worker.step()
            worker.step()
        for _ in range(arguments.rounds * arguments.batches - 1):
            for worker in (*going, *later):
                worker.step()
        return workers, []
    finally:
        for worker in workers:
            worker.stop()


def _apart(ours: list[Spec], trl: list[Spec], arguments: argparse.Namespace) -> tuple[list[Worker], list[str]]:
    """One process after the other, each with all of its steps: two trainings may not fit one GPU.

    A kind of TRL that does not run (out of memory, say) is named; without any, or without ours, there is no comparison.
    """
    finished = _run(ours, arguments)
    failed: list[str] = []
    for spec in trl:
        finished += _try(spec, arguments, failed)
    theirs = [worker for worker in finished if worker.spec.engine == TRL]
    if not theirs:
        raise EngineError("\n".join(failed))
    mine = finished[: len(ours)]
    fastest = [min(side, key=lambda w: sum(w.steps.seconds[_warm_ups(w.spec) :])).spec for side in (mine, theirs)]
    for spec in _others(fastest[0], fastest[1], arguments):
        finished += _try(spec, arguments, failed)
    return finished, failed


def _try(spec: Spec, arguments: argparse.Namespace, failed: list[str]) -> list[Worker]:
    try:
        return _run([spec], arguments)
    except EngineError as error:
        failed.append(f"{spec.name}: did not run: {str(error).strip().splitlines()[-1]}")
        return []


def _warm_ups(spec: Spec) -> int:
    """Compiled code wants to have seen every batch."""
    return 1 if spec.device == "cpu" else len(spec.batches)


def break_down(_: str, base: Spec, __: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median share of each part of a step over the steps after the warm-ups."""
    spec = replace(base, name="ours, by parts", engine="tests.benchmarks.engine_breakdown:run", compiled=False)
    (worker,) = _run([spec], arguments)
    parts = [extra["parts"] for extra in worker.steps.extra[_warm_ups(spec) :]]
    seconds = {part: statistics.median(each.get(part, 0.0) for each in parts) for part in PARTS}
    total = sum(seconds.values())
    for part, each in seconds.items():
        print(f"  {part:<32} {each * 1e3:10.1f} ms {each / total:6.1%}")
    print(f"  {'a step of ' + str(arguments.batch_pairs) + ' pairs':<32} {total * 1e3:10.1f} ms")
    return seconds


def ablate(_: str, base: Spec, __: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step takes without each technique, in time and memory; nothing is compiled."""
    engine = "tests.benchmarks.engine_ablations:run"
    specs = [
        replace(base, name=f"without {what}" if what else "ours", engine=engine, leave_out=what, compiled=False)
        for what in DESCRIPTIONS
    ]
    workers = _run(specs, arguments)
    check_losses(workers, arguments.device)
    results = [Result(worker, _warm_ups(base)) for worker in workers]
    found = {}
    for result in results:
        time, memory = results[0].rate / result.rate, result.peak_bytes / results[0].peak_bytes
        found[result.spec.name] = {"time": time, "memory": memory}
        print(f"  {result.spec.name:<34} {result.rate:7.3g} pairs/s, {time:5.2f} times the time, "
              f"{result.peak_bytes / 1e6:6.0f} MB ({memory:.2f}): {DESCRIPTIONS[result.spec.leave_out]}")  # fmt: skip
    return found


def _run(specs: Sequence[Spec], arguments: argparse.Namespace) -> list[Worker]:
    """All of them to the end, in turns on CPUs, one after the other on GPUs."""
    steps = _warm_ups(specs[0]) + arguments.rounds * arguments.batches
    groups = [list(specs)] if arguments.device == "cpu" else [[spec] for spec in specs]
    finished = []
    for group in groups:
        workers = [Worker(spec) for spec in group]
        try:
            for worker in workers:
                start([worker])
            for _ in range(steps):
                for worker in workers:
                    worker.step()
        finally:
            for worker in workers:
                worker.stop()
        finished += workers
    return finished


def _machine(arguments: argparse.Namespace, shape: Shape) -> str:
    import torch
    import trl

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"threads: {arguments.threads}"
    weights = shape.vocabulary_weights + shape.layer_weights
    where += ", time computed" if arguments.cpu_time else ""
    precision = "fp32" if arguments.device == "cpu" else "bf16 over fp32 masters"
    return (
        f"{shape}\n{weights / 1e6:.1f} million weights, {shape.vocabulary_weights / weights:.0%} of them the "
        f"vocabulary matrix; {precision}, AdamW, steps of {arguments.batch_pairs} pairs; {where}, load "
        f"{os.getloadavg()[0]:.1f}; TRL {trl.__version__}, torch {torch.__version__}"
    )


def _lengths(pairs: Sequence[TokenPair]) -> str:
    prompts = statistics.mean(len(pair.prompt_ids) for pair in pairs)
    answers = statistics.mean(len(ids) for pair in pairs for ids in pair.answer_ids)
    return f"{len(pairs)} pairs, prompts of {prompts:.0f} and answers of {answers:.0f} tokens on average"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--params", choices=SHAPES, default="22m", help="size of the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-pairs", type=int, help="pairs of an optimiser step; default: 4, on GPUs 128")
    parser.add_argument("--batches", type=int, default=3, help="different batches; together they are a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--row-tokens", type=int, nargs="+", help="ours; of several the fastest counts; default: 1024, on GPUs 16384"
    )
    parser.add_argument(
        "--trl-batch", type=int, nargs="+", help="pairs per device to try; default: 1 2 4, on GPUs 8 16 32"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cpu-time", action="store_true", help="on a busy machine: one thread, and the time that each process computed"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of our layers, and TRL with and without")
    parser.add_argument("--checkpointing", action="store_true", help="both with activation checkpointing as well")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if arguments.cpu_time and on_gpu:
        parser.error("--cpu-time is for CPUs")
    arguments.threads = 1 if arguments.cpu_time else arguments.threads
    arguments.batch_pairs = arguments.batch_pairs or (128 if on_gpu else 4)
    arguments.row_tokens = arguments.row_tokens or [16384 if on_gpu else 1024]
    arguments.trl_batch = arguments.trl_batch or ([8, 16, 32] if on_gpu else [1, 2, 4])
    if any(arguments.batch_pairs % size for size in arguments.trl_batch):
        parser.error("--batch-pairs must be a multiple of each --trl-batch: TRL weighs micro-batches alike")
    return arguments


if __name__ == "__main__":
    main()
