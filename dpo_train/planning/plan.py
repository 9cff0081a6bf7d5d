"""The whole plan of a run, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_train.config import RunConfig, parse_config
from dpo_train.config.loading import to_text
from dpo_train.errors import ConfigError, ModelError
from dpo_train.planning.gpus import GPUS, Device
from dpo_train.planning.memory import Outline, StageMemory, evaluate_memory, score_memory, train_memory
from dpo_train.planning.sizes import Sizes
from dpo_train.planning.work import StageWork, work_of
from dpo_train.planning.workload import Workload

WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of workers that are tried."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change with which every stage fits."""

    changes: tuple[str, ...]
    """Overrides, or the name of another GPU."""
    bytes: float
    """What the fullest stage then takes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known before a run."""

    device: Device
    workload: Workload
    weights: int
    active: int
    """Those that a token meets: of a mixture of experts not all."""
    trained: int
    memory: tuple[StageMemory, ...]
    work: tuple[StageWork, ...]
    trained_pairs: int
    """Pairs that the training sees, each as often as it is seen."""
    mfu: float
    price: float | None
    """Of a GPU hour."""
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool | None:
        """None: the device's memory is not known."""
        return None if self.device.memory_bytes is None else self.fullest.total <= self.device.memory_bytes

    @property
    def pairs_per_second(self) -> float | None:
        """Of the training, over all GPUs."""
        train = next(stage for stage in self.work if stage.stage == "train")
        return None if not train.seconds else self.trained_pairs / train.seconds

    def cost(self, stage: StageWork) -> float | None:
        hours = stage.gpu_hours
        return None if hours is None or self.price is None else hours * self.price


def make_plan(
    config: RunConfig, outline: Outline, device: Device, workload: Workload, *, mfu: float, price: float | None
) -> Plan:
    """Plans every stage that computes with the model.

    Raises:
        ModelError: the model cannot be laid out from its config.
    """
    memory, sizes, train = _memory(config, outline, device, workload), outline.sizes, config.train
    trained = sizes.trained if train.lora is None else outline.adapters(train.lora)
    pairs = workload.train_pairs * train.epochs
    if train.max_steps is not None:
        pairs = min(pairs, train.max_steps * train.batch_pairs)
    does_fit = device.memory_bytes is None or max(s.total for s in memory) <= device.memory_bytes
    return Plan(
        device=device,
        workload=workload,
        weights=sizes.total,
        active=sizes.active,
        trained=sum(weight.numel for weight in trained),
        memory=memory,
        work=tuple(work_of(config, sizes, device, workload, mfu)),
        trained_pairs=pairs,
        mfu=mfu,
        price=price,
        advice=() if does_fit else tuple(_advice(config, outline, device, workload)),
        notes=(*_notes(config, device), *_notes_on_experts(config, sizes, device)),
    )


def _memory(config: RunConfig, outline: Outline, device: Device, workload: Workload) -> tuple[StageMemory, ...]:
    sft = [train_memory(config, outline, device, workload, config.sft)] if config.sft.enabled else []
    return (
        *sft,
        score_memory(config, outline, device, workload),
        train_memory(config, outline, device, workload, config.train),
        evaluate_memory(config, outline, device, workload),
    )


def _notes(config: RunConfig, device: Device) -> Iterator[str]:
    compute = config.compute
    if not device.has_bf16 and config.model.in_bf16(on_gpu=True):
        yield f"{device.name} has no bf16: the speed is that of its fp16, which this engine does not use"
    if device.is_gpu and not config.model.in_bf16(on_gpu=True):
        yield "model.precision=fp32: the times are those of bf16 and too short; GPUs take several times as long"
    if compute.workers > 1 and compute.executor == "local":
        yield "compute.executor=local is one worker, whatever compute.workers says"
    longest = config.prepare.max_prompt_tokens + 2 * config.prepare.max_answer_tokens
    if longest > config.train.row_tokens:
        yield (
            f"a pair may be longer than a row ({longest:,} tokens at most, train.row_tokens="
            f"{config.train.row_tokens:,}) and would then take more"
        )


def _notes_on_experts(config: RunConfig, sizes: Sizes, device: Device) -> Iterator[str]:
    if not sizes.num_experts:
        return
    yield (
        f"a mixture of experts: a token meets {sizes.active / 1e9:.3g} of {sizes.total / 1e9:.3g} billion weights; "
        "memory holds all of them"
    )
    if config.model.quantization is not None:
        yield "experts stay as they are: NF4 replaces linear modules, and a layer's experts are one tensor"
    if config.train.lora is None and config.model.in_bf16(on_gpu=device.is_gpu):
        yield "experts that are trained are multiplied in fp32, which autocast does not change: it takes longer"
    if config.compute.workers > sizes.num_experts and (config.train.lora is None or config.compute.shard == "on"):
        yield (
            f"FSDP2 gives each rank whole experts of a layer: more than {sizes.num_experts} workers make no share of "
            "them smaller, and what is gathered larger"
        )


def _advice(config: RunConfig, outline: Outline, device: Device, workload: Workload) -> Iterator[Advice]:
    """Of each kind of change the least that makes every stage fit."""
    assert device.memory_bytes is not None
    for changes_of_a_kind in _kinds(config, device):
        for changes in changes_of_a_kind:
            total = _total(config, outline, device, workload, changes)
            if total is not None and total <= device.memory_bytes:
                yield Advice(changes=changes, bytes=total)
                break
    for other in GPUS.values() if device.is_gpu else ():
        assert other.memory_bytes is not None
        if other.memory_bytes > device.memory_bytes:
            total = _total(config, outline, other, workload, ())
            if total is not None and total <= other.memory_bytes:
                yield Advice(changes=(f"--gpu {other.name}",), bytes=total)
                return


def _kinds(config: RunConfig, device: Device) -> Iterator[list[tuple[str, ...]]]:
    """Overrides by kind; of each kind those that change least first."""
    compute, train = config.compute, config.train
    full = () if compute.activation_checkpointing == "full" else ("compute.activation_checkpointing=full",)
    rows = [train.row_tokens // size for size in (2, 4) if train.row_tokens // size >= 512]
    yield [
        ("evaluate.sample_batch=8",),
        ("compute.activation_checkpointing=selective",),
        ("compute.activation_checkpointing=full",),
        *((*full, f"train.row_tokens={tokens}") for tokens in rows),
    ]
    together = (*full, "compute.score_sharded=true", *(() if train.lora is None else ("compute.shard=on",)))
    workers = [count for count in WORKERS if count >= compute.workers and count % compute.workers == 0]
    more = [(*together, *([] if n == compute.workers else [f"compute.workers={n}"])) for n in workers if n > 1]
    wide = [(*together, f"compute.workers={n}", "compute.tensor_parallel=8") for n in workers if n >= 8]
    yield [*more, *(wide if train.lora is None else [])]
    if train.lora is None:
        yield [("train.lora={}",), ("train.lora={}", *full)]
    if device.is_gpu and config.model.quantization is None:
        alone = "compute.score_sharded=false" if compute.score_sharded else ""
        quantised = ("train.lora={}", "model.quantization=nf4", *([alone] if alone else []))
        yield [quantised, (*quantised, *full)]


def _total(
    config: RunConfig, outline: Outline, device: Device, workload: Workload, changes: tuple[str, ...]
) -> float | None:
    """Bytes of the fullest stage with these overrides; None if they contradict the rest."""
    try:
        changed = parse_config(to_text(config), changes)
        return max(stage.total for stage in _memory(changed, outline, device, workload))
    except (ConfigError, ModelError):
        return None


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain types, units in the names; what is not known is null."""
    return {
        "device": {"name": plan.device.name, "memory_bytes": plan.device.memory_bytes, "tflops": plan.device.tflops},
        "model": {"weights": plan.weights, "active_weights": plan.active, "trained_weights": plan.trained},
        "data": {
            "origin": plan.workload.origin,
            "train_pairs": plan.workload.train_pairs,
            "validation_pairs": plan.workload.validation_pairs,
            "heldout_pairs": plan.workload.heldout_pairs,
            "mean_prompt_tokens": plan.workload.prompt_tokens,
            "mean_answer_tokens": plan.workload.answer_tokens,
        },
        "memory": [
            {
                "stage": stage.stage,
                "row_tokens": stage.tokens,
                "highest_at": stage.when,
                "total_bytes": stage.total,
                "parts_bytes": dict(stage.parts),
            }
            for stage in plan.memory
        ],
        "fits": plan.fits,
        "advice": [{"changes": list(advice.changes), "total_bytes": advice.bytes} for advice in plan.advice],
        "train_pairs_per_second": plan.pairs_per_second,
        "assumed_mfu": plan.mfu,
        "price_per_gpu_hour": plan.price,
        "time": [
            {
                "stage": stage.stage,
                "gpus": stage.num_gpus,
                "flops": stage.flops,
                "seconds": stage.seconds,
                "gpu_hours": stage.gpu_hours,
                "cost": plan.cost(stage),
            }
            for stage in plan.work
        ],
        "notes": list(plan.notes),
    }
