"""Engines in processes of their own that take steps in turns, and how much memory each of them takes.

A process says "imported" and waits for its turn to load and to score the reference; it says "ready", and waits for
"step" or "stop". What it holds between its turns costs no time. On CPUs memory is the high-water mark of anonymous
resident memory (weights, gradients, optimiser, activations; no code, no mapped file), read every 10 ms by the parent
process, from start to end. On GPUs it is the most that torch's allocator had handed out.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dpo_train.data.pairs import TokenPair

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One engine with its options. ``engine`` names the function "module:function" that runs it."""

    name: str
    engine: str
    model: Path
    batches: tuple[tuple[TokenPair, ...], ...]
    device: str
    cpu_time: bool
    """Seconds are those that the process computed, whatever else the machine did; for one thread."""
    scratch: Path
    learning_rate: float
    beta: float = 0.1
    row_tokens: int = 2048
    """Ours: tokens of a row."""
    micro_pairs: int = 1
    """TRL's: pairs that are padded together."""
    precomputed: bool = True
    """TRL's: the reference's log-probs are computed once, ahead."""
    checkpointing: bool = False
    compiled: bool = False
    liger: bool = False
    leave_out: str = ""
    """The technique that an ablation does without."""

    def batch(self, step: int) -> tuple[TokenPair, ...]:
        """The pairs of a step: the batches again and again."""
        return self.batches[step % len(self.batches)]

    @property
    def pairs(self) -> list[TokenPair]:
        return [pair for batch in self.batches for pair in batch]


class Turns:
    """The child's side."""

    def __init__(self, connection: Connection, device: str, *, cpu_time: bool) -> None:
        self._connection, self._device = connection, device
        self._now = time.process_time if cpu_time else time.perf_counter
        self._start = 0.0

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        settle(self._device)
        return self._now()

    def imported(self) -> None:
        """Called before anything is loaded: waits until no other process works."""
        self._connection.send(("imported", {}))
        self._connection.recv()

    def ready(self, **info: Any) -> None:
        """Everything is loaded; ``info`` goes to the parent."""
        self._connection.send(("ready", info))

    def wait(self) -> bool:
        """Waits for the next turn and starts its clock; False: it was the last."""
        go: bool = self._connection.recv() == "step"
        self._start = self.now()
        return go

    def done(self, loss: float, **info: Any) -> None:
        """Ends a turn."""
        seconds = self.now() - self._start
        self._connection.send(("step", {"seconds": seconds, "loss": loss, **info, **_gpu_bytes(self._device)}))


def settle(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _gpu_bytes(device: str) -> dict[str, int]:
    if device != "cuda":
        return {}
    import torch

    return {"gpu_bytes": torch.cuda.max_memory_allocated()}


def start(workers: Sequence[Worker]) -> None:
    """Imports side by side, then loads one after the other."""
    for worker in workers:
        worker.wait_imported()
    for worker in workers:
        worker.load()


class EngineError(Exception):
    """An engine's process has failed."""


@dataclass
class Steps:
    """What a worker has done so far. The first step of each is a warm-up and counts for its loss alone."""

    info: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)


class Worker:
    """The parent's side of one engine."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log = spec.scratch / f"{spec.name.replace(' ', '-').replace('/', '-')}.log"
        self._process = context.Process(target=_work, args=(spec, theirs, self._log), daemon=True)
        self._process.start()
        theirs.close()
        self.peak_bytes = self.imported_bytes = 0
        """At the highest, and before anything was loaded."""
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self.steps = Steps({})

    def wait_imported(self) -> None:
        self._receive("imported")
        self.imported_bytes = self.peak_bytes

    def load(self) -> None:
        """Its turn to load, and to score the reference."""
        self._connection.send("load")
        self.steps.info = self._receive("ready")

    def step(self) -> None:
        """One turn."""
        self._connection.send("step")
        found = self._receive("step")
        self.steps.seconds.append(found.pop("seconds"))
        self.steps.losses.append(found.pop("loss"))
        self.peak_bytes = max(self.peak_bytes, found.pop("gpu_bytes", 0))
        self.steps.extra.append(found)

    def stop(self) -> None:
        """Ends the process; what it did stays here."""
        self._over.set()
        if self._process.is_alive():
            try:
                self._connection.send("stop")
            except OSError:
                self._process.terminate()
            self._process.join(60)
            if self._process.is_alive():
                self._process.kill()
        self._sampler.join()

    def _receive(self, kind: str) -> dict[str, Any]:
        try:
            got, value = self._connection.recv()
        except EOFError:
            self._process.join()
            tail = self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""
            raise EngineError(f"{self.spec.name} ended with {self._process.exitcode}\n{tail}") from None
        if got == "failed":
            raise EngineError(f"{self.spec.name} failed:\n{value}")
        assert got == kind, (got, kind)
        return dict(value)

    def _sample(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while self.spec.device == "cpu" and not self._over.wait(SAMPLE_SECONDS):
            try:
                text = status.read_text()
            except OSError:
                return
            line = next((line for line in text.splitlines() if line.startswith("RssAnon")), None)
            if line is None:  # the process has ended
                return
            self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)


def _work(spec: Spec, connection: Connection, log: Path) -> None:
    """The child: what it prints goes to its log."""
    with log.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    try:
        module, function = spec.engine.split(":")
        getattr(importlib.import_module(module), function)(spec, Turns(connection, spec.device, cpu_time=spec.cpu_time))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
