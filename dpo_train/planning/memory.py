"""What one GPU (or one process on CPUs) holds when it holds most, stage by stage and part by part.

    fixed: weights, optimiser, gradients of rows before, each a rank's share where FSDP2 cuts them
    row:   the traced peak of one of its phases (trace.py), and what FSDP2 gathers meanwhile
    needed = the largest sum over the phases + what CUDA, libraries and fragments take

docs/plan.md has every formula with its source.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_train.config import FitConfig, LoraConfig, RunConfig, TrainConfig
from dpo_train.errors import ModelError
from dpo_train.model.outline import cut_config
from dpo_train.planning.gpus import Device
from dpo_train.planning.rows import FullRow, fullest_row, prompts_row
from dpo_train.planning.sizes import Sizes, Stored, Weight, adapters_of, placed_adapters, sizes_of
from dpo_train.planning.trace import PHASES, Peak, Way, trace
from dpo_train.planning.workload import Workload

CONTEXT_BYTES = 1.0e9
"""CUDA's context, cuBLAS's work space and compiled kernels: assumed; torch's own count does not see them."""
NCCL_BYTES = 0.5e9
"""Buffers of NCCL's channels, with several ranks: assumed."""
FRAGMENTS = 0.05
"""Of what is allocated, lost to torch's caching allocator: assumed."""
PROCESS_BYTES = 10e6
"""On CPUs: libraries' buffers and what is imported late, as measured (docs/plan.md)."""

PARTS = {
    "weights": "weights",
    "optimiser": "optimiser state",
    "gradients": "gradients",
    "gathered": "weights gathered by FSDP2",
    "copies": "bf16 copies of fp32 weights",
    "activations": "activations kept of a row",
    "working": "working memory (logits, a layer's backward)",
    "cache": "keys and values of answers",
    "snapshot": "checkpoint on its way to disk",
    "reserve": "libraries, and CUDA's own (assumed)",
}
"""In the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Of the GPU that holds most."""

    stage: str
    when: str
    """It holds most."""
    parts: Mapping[str, float]
    """Bytes, by name of PARTS; nothing that is not there."""
    tokens: int
    """Of its row."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model to plan with: its config, as transformers has it, and what can be counted of it."""

    config: Any
    trust: bool = False
    _traces: dict[Any, dict[str, Peak]] = field(default_factory=dict)
    _adapters: dict[str, tuple[Weight, ...]] = field(default_factory=dict)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.config, trust_remote_code=self.trust)

    def cut(self, tensor_parallel: int, frozen: Iterable[str]) -> Sizes:
        """What one rank of a tensor group has of each layer's matrices.

        Raises:
            ModelError: they cannot be cut so.
        """
        if tensor_parallel > 1 and self.sizes.num_experts:
            raise ModelError(
                "A mixture of experts is not trained with tensor parallelism",
                got=f"compute.tensor_parallel={tensor_parallel}",
                fix="set compute.tensor_parallel=1",
            )
        config = cut_config(self.config, tensor_parallel=tensor_parallel)
        return sizes_of(config, frozen=frozen, trust_remote_code=self.trust)

    def adapters(self, lora: LoraConfig) -> tuple[Weight, ...]:
        """Those that a training begins with."""
        if not self.sizes.num_experts:
            return adapters_of(self.sizes, lora)
        key = repr(lora)
        if key not in self._adapters:
            self._adapters[key] = placed_adapters(self.config, lora, trust_remote_code=self.trust)
        return self._adapters[key]

    def peaks(self, way: Way, row: FullRow, tensor_parallel: int) -> dict[str, Peak]:
        """The phases of a row; each is traced once."""
        key = (way, row, tensor_parallel)
        if key not in self._traces:
            config = cut_config(self.config, tensor_parallel=tensor_parallel)
            lengths = [list(each) for each in row.lengths]
            unlike = self.sizes.num_unlike
            self._traces[key] = trace(config, way, row.build(), lengths, num_unlike=unlike, trust=self.trust)
        return self._traces[key]


def train_memory(
    config: RunConfig, outline: Outline, device: Device, workload: Workload, fit: FitConfig
) -> StageMemory:
    """A step of a training, of either kind.

    Raises:
        ModelError: the model cannot be laid out, or not be cut so.
    """
    compute, plan = config.compute, _Shares.of(config, outline, fit, device)
    compiled = (device.is_gpu and compute.compile != "off") or compute.compile == "on"
    row = fullest_row(workload, fit.row_tokens, pairs=fit.batch_pairs, num_shares=plan.num_shares, padded=compiled)
    checkpointing = compute.activation_checkpointing
    accumulates = row.per_step > 1
    way = Way(
        lora=fit.lora, checkpointing=checkpointing, on_gpu=device.is_gpu, bf16=plan.bf16, trains=True,
        full_weights=fit.lora is None, accumulates=accumulates and not plan.sharded,
        with_router=is_balanced(fit, plan.sizes),
    )  # fmt: skip
    ways = [way]
    if compiled and checkpointing == "off":
        ways.append(dataclasses.replace(way, checkpointing="selective"))
    found = []
    for each in ways:
        phases = _train_phases(plan, outline.peaks(each, row, compute.tensor_parallel), accumulates=accumulates)
        phases["update"] = plan.fixed() | {"gradients": plan.gradients, "working": plan.update_bytes(fit)}
        found.append(_highest(phases))
    when, parts = min(found, key=lambda item: sum(item[1].values()))
    snapshot = plan.trained + plan.optimiser if not device.is_gpu else 0.0
    if snapshot:
        when, parts = _with_snapshot(when, parts, plan, snapshot, _saves_between(config, workload, fit))
    return _finished(fit.section, when, parts, row, device, compute.workers)


def score_memory(config: RunConfig, outline: Outline, device: Device, workload: Workload) -> StageMemory:
    """Reference log-probs: a forward of one row."""
    plan = _Shares.of(config, outline, config.train, device, trains=False)
    row = fullest_row(workload, config.score.row_tokens, pairs=None)
    peaks = outline.peaks(_forward(config, device), row, plan.tensor_parallel)
    when, parts = _highest(_forward_phases(plan, peaks))
    return _finished("score_reference", when, parts, row, device, plan.num_ranks)


def evaluate_memory(config: RunConfig, outline: Outline, device: Device, workload: Workload) -> StageMemory:
    """Held-out pairs as they are scored, or answers as they are sampled, whichever takes more."""
    section, plan = config.evaluate, _Shares.of(config, outline, config.train, device, trains=False)
    row, way = fullest_row(workload, section.row_tokens, pairs=None), _forward(config, device)
    phases = {
        f"scoring, {when}": parts
        for when, parts in _forward_phases(plan, outline.peaks(way, row, plan.tensor_parallel)).items()
    }
    if section.num_prompts:
        prompt = workload.longest_prompt or config.prepare.max_prompt_tokens
        prompts = prompts_row(prompt, section.sample_batch)
        cache = section.sample_batch * (prompt + section.max_sample_tokens) * plan.cache_bytes
        logits = 16.0 * section.sample_batch * plan.sizes.vocabulary
        begin = _forward_phases(plan, outline.peaks(way, prompts, plan.tensor_parallel))["forward"]
        # A step makes a layer's keys and values anew, one token longer.
        longer = cache * (1 + 1 / plan.sizes.num_layers)
        phases["sampling, the prompts"] = begin | {"cache": cache, "working": begin["working"] + logits}
        phases["sampling, the last token"] = begin | {"cache": longer, "working": logits}
    when, parts = _highest(phases)
    return _finished("evaluate", when, parts, row, device, plan.num_ranks)


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """What a rank holds of a model, in bytes."""

    sizes: Sizes
    """Cut by tensor parallelism."""
    num_ranks: int
    num_shares: int
    tensor_parallel: int
    sharded: bool
    weights: float
    trained: float
    gradients: float
    optimiser: float
    cache_bytes: float
    """Keys and values of a token, in all layers."""
    root: float
    """Whole, as it is gathered once for a row: all but the layers."""
    layer: float
    """Whole: the largest layer."""
    root_trained: float
    layer_trained: float
    dequantised: float
    on_gpu: bool
    bf16: bool

    @classmethod
    def of(cls, config: RunConfig, outline: Outline, fit: FitConfig, device: Device, *, trains: bool = True) -> _Shares:
        compute, full = config.compute, fit.lora is None
        if trains:
            ranks = compute.workers
            sharded = ranks > 1 and (compute.shard == "on" or (compute.shard == "auto" and full))
        else:
            sharded = compute.score_sharded and compute.workers > 1
            ranks = compute.workers if sharded else compute.data_workers
        parallel = compute.tensor_parallel if sharded else 1
        sizes = outline.cut(parallel, fit.frozen)
        num_cut = ranks // parallel if sharded else 1
        bf16 = config.model.in_bf16(on_gpu=device.is_gpu)
        stored: Stored = "bf16" if bf16 and not full else "fp32"
        base, written_out = stored, 0.0
        if config.model.quantization:
            base, written_out = ("nf4", 2.0) if bf16 else ("nf4, fp32", 4.0)
        adapters = () if fit.lora is None else outline.adapters(fit.lora)
        trained = sizes.trained if full else adapters
        moments = {"adamw": 2, "rmsprop": 1}[fit.optimizer]
        shares = _sum(trained, num_cut, "fp32")
        in_layers = _by_layer(sizes.weights, num_cut, base)
        root, layer = in_layers.pop(None, 0.0), max(in_layers.values(), default=0.0)
        of_layers = _by_layer(trained, num_cut, "fp32")
        root_trained, layer_trained = of_layers.pop(None, 0.0), max(of_layers.values(), default=0.0)
        sizes_kv = sizes.num_layers * sizes.key_value_width
        return cls(
            sizes=sizes,
            num_ranks=ranks,
            num_shares=ranks // parallel,
            tensor_parallel=parallel,
            sharded=sharded,
            weights=sizes.bytes_on(num_cut, base) + (_sum(adapters, num_cut, "fp32")),
            trained=shares,
            gradients=shares,
            optimiser=moments * shares,
            # Rotary embeddings leave keys in the dtype of the hidden states, fp32 under fp32 weights.
            cache_bytes=sizes_kv * (8 if not bf16 else 6 if full else 4),
            root=root,
            layer=layer + (0.0 if full else layer_trained),
            root_trained=root_trained,
            layer_trained=layer_trained,
            dequantised=written_out * max((w.numel for w in sizes.weights if w.is_linear), default=0),
            on_gpu=device.is_gpu,
            bf16=bf16,
        )

    def fixed(self) -> dict[str, float]:
        return {"weights": self.weights, "optimiser": self.optimiser}

    @property
    def buffers(self) -> float:
        """Of layers that FSDP2 holds whole at a time: the one that computes, the next one gathered, and its message or
        that of the gradients. On GPUs a message that has been sent is kept until the next."""
        return (4 if self.on_gpu else 3) * self.layer

    def update_bytes(self, fit: FitConfig) -> float:
        """RMSprop makes a list of all denominators. Ranks that hold whole copies add gradients in one long message."""
        denominators = self.trained if fit.optimizer == "rmsprop" else 0.0
        message = self.gradients if not self.sharded and self.num_shares > 1 else 0.0
        return max(denominators, message)


def _train_phases(plan: _Shares, peaks: Mapping[str, Peak], *, accumulates: bool) -> dict[str, dict[str, float]]:
    """Every phase's parts; phases are told in words."""
    found = {}
    for name in PHASES:
        row = {str(kind): value for kind, value in peaks[name].at(plan.sizes.num_layers).items()}
        parts = plan.fixed() | row
        parts["working"] += plan.dequantised
        if plan.sharded:
            parts |= _sharded(plan, name, peaks[name], accumulates=accumulates)
        elif accumulates:
            parts["gradients"] += plan.gradients
        found[name if name == "forward" else f"backward, {name}"] = parts
    return found


def _sharded(plan: _Shares, phase: str, peak: Peak, *, accumulates: bool) -> dict[str, float]:
    """What is gathered, and gradients: whole ones of a layer and of what belongs to none, a share of the others."""
    gathered = {
        # Everything but the layers is gathered as the row begins, message and copy, and the first layer with it.
        "forward": plan.root + max(plan.root + 2 * plan.layer, plan.buffers),
        "head": plan.root + 2 * plan.layer,
        "last layer": plan.root + plan.buffers,
        "first layer": plan.root + max(plan.buffers, plan.root_trained),
    }[phase]
    whole = peak.at(plan.sizes.num_layers)["gradients"]
    if phase == "first layer":
        whole = peak.at(1)["gradients"]
    shares = plan.gradients if accumulates or phase == "first layer" else 0.0
    return {"gathered": gathered, "gradients": max(0.0, whole) + shares}


def _forward_phases(plan: _Shares, peaks: Mapping[str, Peak]) -> dict[str, dict[str, float]]:
    parts = {"weights": plan.weights}
    parts |= {str(kind): value for kind, value in peaks["forward"].at(plan.sizes.num_layers).items()}
    parts["working"] += plan.dequantised
    if plan.sharded:
        parts["gathered"] = plan.root + max(plan.root + 2 * plan.layer, plan.buffers)
    return {"forward": parts}


def _forward(config: RunConfig, device: Device) -> Way:
    lora, bf16 = config.train.lora, config.model.in_bf16(on_gpu=device.is_gpu)
    return Way(lora=lora, checkpointing="off", on_gpu=device.is_gpu, bf16=bf16, trains=False, full_weights=lora is None)


def _saves_between(config: RunConfig, workload: Workload, fit: FitConfig) -> bool:
    """Whether a checkpoint is written while training goes on, not only at the end."""
    return fit.checkpoint_steps < steps_of(fit, workload)


def is_balanced(fit: FitConfig, sizes: Sizes) -> bool:
    """Whether a mixture's balancing loss is part of the training; its coefficient is the model's, if none is set."""
    given = fit.router_aux_loss if isinstance(fit, TrainConfig) else None
    return sizes.num_experts > 0 and (sizes.aux_loss_coef if given is None else given) > 0


def steps_of(fit: FitConfig, workload: Workload) -> int:
    """Steps of a training."""
    steps = -(-workload.train_pairs * fit.epochs // fit.batch_pairs)
    return min(steps, fit.max_steps or steps)


def _with_snapshot(
    when: str, parts: dict[str, float], plan: _Shares, snapshot: float, between: bool
) -> tuple[str, dict[str, float]]:
    """On CPUs a checkpoint's copy lies in the same memory, beside the steps that go on or after the last one."""
    at_end = plan.fixed() | {"gradients": plan.gradients, "snapshot": snapshot}
    if between:
        return when, parts | {"snapshot": snapshot}
    return max((when, parts), ("saving", at_end), key=lambda item: sum(item[1].values()))


def _highest(phases: Mapping[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """The phase that takes most. Parts of a trace may come out a little below zero, where peaks lie elsewhere."""
    clean = {name: {part: max(0.0, value) for part, value in parts.items()} for name, parts in phases.items()}
    return max(clean.items(), key=lambda item: sum(item[1].values()))


def _finished(
    stage: str, when: str, parts: dict[str, float], row: FullRow, device: Device, num_ranks: int
) -> StageMemory:
    nccl = NCCL_BYTES if num_ranks > 1 else 0.0
    on_gpu = CONTEXT_BYTES + nccl + FRAGMENTS * sum(parts.values())
    parts["reserve"] = on_gpu if device.is_gpu else PROCESS_BYTES
    shown = {name: parts[name] for name in PARTS if parts.get(name, 0) > 0}
    return StageMemory(stage=stage, when=when, parts=shown, tokens=row.tokens)


def _sum(weights: Iterable[Weight], num_ranks: int, stored: Stored) -> float:
    return sum(weight.bytes_on(num_ranks, stored) for weight in weights)


def _by_layer(weights: Iterable[Weight], num_ranks: int, stored: Stored) -> dict[int | None, float]:
    """As FSDP2 gathers them: every rank's share as large as the largest. Of 4 experts on 8 ranks that is twice."""
    found: dict[int | None, float] = {}
    for weight in weights:
        found[weight.layer] = found.get(weight.layer, 0.0) + num_ranks * weight.bytes_on(num_ranks, stored)
    return found
