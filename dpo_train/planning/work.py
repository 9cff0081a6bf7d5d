"""Operations, time and cost of a run, stage by stage.

Counted as docs/performance.md does: a multiplication and addition are 2 operations, each prompt is computed once, only
answer tokens meet the vocabulary matrix, attention works where there is something to see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_train.config import FitConfig, LogUniform, RunConfig, SftConfig
from dpo_train.objective import is_over_batch
from dpo_train.planning.gpus import Device
from dpo_train.planning.memory import is_balanced, steps_of
from dpo_train.planning.sizes import Sizes
from dpo_train.planning.workload import Workload

DEFAULT_MFU = 0.4
"""Share of the peak that is reached: assumed. Dense trainings of this size report 0.38 to 0.43 (arXiv 2407.21783,
table 4)."""
DECODE_BANDWIDTH = 0.5
"""Share of the memory's bandwidth at which generation reads the weights once a token: assumed."""
DECODE_SECONDS_PER_LAYER = 0.8e-3
"""What transformers' Python takes for a layer and a token at least: assumed."""


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """One stage on so many GPUs side by side."""

    stage: str
    num_gpus: int
    flops: float
    seconds: float | None
    """None: the device's speed is not known."""
    what: str

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.num_gpus / 3600


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Operations of one pair's forward, by part."""

    layers: float
    attention: float
    head: float
    experts: float = 0.0
    """Of the layers' operations those in experts."""

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head

    def training(self, *, lora: bool, recomputed: bool, ahead: bool) -> float:
        """Forward, backward and what is computed again.

        Backward to the inputs costs a forward, and to the weights another where they are trained. The log-probs'
        backward makes its logits again. ``recomputed``: full activation checkpointing. ``ahead``: a loss over the
        batch, or a mixture's balance, asks for a forward without gradients first.
        """
        # PEFT adds an adapter's product to the experts' weights, whose gradient is then made whole.
        layers = self.layers * (2 if lora else 3) + self.experts * lora + self.attention * 3
        head = self.head * (3 if lora else 4)
        return layers + head + recomputed * (self.layers + self.attention) + ahead * self.total


def forward_flops(sizes: Sizes, prompt: float, answer: float, *, answers: int = 2) -> Forward:
    """Of one prompt with its answers in a row."""
    visible = prompt**2 / 2 + answers * answer * (prompt + answer / 2)
    return Forward(
        layers=2.0 * sizes.linear * (prompt + answers * answer),
        attention=4.0 * sizes.num_layers * sizes.attention_width * visible,
        head=2.0 * sizes.hidden * sizes.vocabulary * answers * answer,
        experts=2.0 * sizes.met_experts * (prompt + answers * answer),
    )


def work_of(config: RunConfig, sizes: Sizes, device: Device, workload: Workload, mfu: float) -> list[StageWork]:
    """Every stage that computes with a model, in order."""
    speed = _Speed(config, sizes, device, workload, mfu)
    found = []
    if config.sft.enabled:
        found.append(speed.training("sft", config.sft, 1))
    pairs = workload.train_pairs + workload.validation_pairs + workload.heldout_pairs
    found.append(speed.stage("score_reference", speed.num_data, pairs * speed.pair.total, f"{pairs:,} pairs, once"))
    if trials := num_trials(config):
        found.append(speed.sweep(trials))
    found.append(speed.training("train", config.train, 1))
    found.append(speed.evaluation())
    return found


def num_trials(config: RunConfig) -> int:
    """Trainings of the sweep; 0 without one."""
    sweep = config.sweep
    if not sweep.space:
        return 0
    sizes = [len(values) for values in sweep.space.values() if not isinstance(values, LogUniform)]
    return (sweep.trials or math.prod(sizes)) * sweep.seeds


class _Speed:
    """Turns operations into seconds."""

    def __init__(self, config: RunConfig, sizes: Sizes, device: Device, workload: Workload, mfu: float) -> None:
        self._config, self._sizes, self._device, self._workload, self._mfu = config, sizes, device, workload, mfu
        compute = config.compute
        self.num_data = compute.workers if compute.score_sharded else compute.data_workers
        self.pair = forward_flops(sizes, workload.prompt_tokens, workload.answer_tokens)

    def stage(self, name: str, num_gpus: int, flops: float, what: str, extra_seconds: float = 0.0) -> StageWork:
        seconds = None
        if self._device.tflops is not None:
            seconds = flops / (num_gpus * self._device.tflops * 1e12 * self._mfu) + extra_seconds
        return StageWork(stage=name, num_gpus=num_gpus, flops=flops, seconds=seconds, what=what)

    def training(self, name: str, fit: FitConfig, times: int) -> StageWork:
        flops, what = self._training(fit, None)
        return self.stage(name, self._config.compute.workers, times * flops, what)

    def sweep(self, trials: int) -> StageWork:
        """Every trial to its end; halving stops some earlier."""
        section = self._config.sweep
        flops, _ = self._training(self._config.train, section.max_steps)
        seconds = trials * self._sampling(section.num_prompts)
        halving = ", at most" if section.halving else ""
        what = f"{trials} trials{halving}"
        return self.stage("sweep", self._config.compute.workers, trials * flops, what, seconds)

    def evaluation(self) -> StageWork:
        """Policy and reference; a champion would be a third."""
        section, pairs = self._config.evaluate, self._workload.heldout_pairs
        answers = section.num_prompts * len(section.temperatures)
        what = f"{pairs:,} held-out pairs, {2 * answers} answers of at most {section.max_sample_tokens} tokens"
        return self.stage("evaluate", self.num_data, pairs * self.pair.total, what, 2 * self._sampling(answers))

    def _training(self, fit: FitConfig, max_steps: int | None) -> tuple[float, str]:
        steps = min(steps_of(fit, self._workload), max_steps or steps_of(fit, self._workload))
        pairs = min(steps * fit.batch_pairs, self._workload.train_pairs * fit.epochs)
        one = self._one(fit)
        ahead = is_balanced(fit, self._sizes) or (not isinstance(fit, SftConfig) and is_over_batch(fit.loss))
        recomputed = self._config.compute.activation_checkpointing == "full"
        flops = pairs * one.training(lora=fit.lora is not None, recomputed=recomputed, ahead=ahead)
        measured = math.ceil(steps / fit.evaluate_steps) if self._workload.validation_pairs else 0
        flops += measured * self._workload.validation_pairs * one.total
        return flops, f"{steps:,} steps of {fit.batch_pairs} pairs"

    def _one(self, fit: FitConfig) -> Forward:
        if isinstance(fit, SftConfig):
            return forward_flops(self._sizes, self._workload.prompt_tokens, self._workload.answer_tokens, answers=1)
        return self.pair

    def _sampling(self, answers: int) -> float:
        """Seconds of one model's answers, each as long as it may be."""
        section = self._config.evaluate
        if not answers or self._device.bandwidth is None:
            return 0.0
        stored = self._sizes.total * (4 if self._config.train.lora is None else 2)
        token = max(
            stored / (DECODE_BANDWIDTH * self._device.bandwidth), DECODE_SECONDS_PER_LAYER * self._sizes.num_layers
        )
        rounds = math.ceil(answers / (section.sample_batch * self.num_data))
        return rounds * section.max_sample_tokens * token
