"""The model and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Le, Len, Lt

from dpo_train.config.kinds import STRICT, Count, Positive, option

# The names of RULES in objective.py, which a test compares; a type has to spell them out.
Loss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "plackett_luce", "sft", "simpo", "orpo", "unlikelihood",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is aligned. Its untrained weights are also the reference."""

    __pydantic_config__ = STRICT

    path: str = option(help="folder in the Hugging Face layout (safetensors), here or at s3://, or a hub name")
    trust_remote_code: bool = option(False, "run Python code that ships with the model; leave off unless you wrote it")
    adapter: str | None = option(
        None,
        "folder of a PEFT adapter that the model has: it is trained on, and the reference is the model with it",
    )
    quantization: Literal["nf4"] | None = option(
        None, "nf4: 4-bit base weights under adapters (QLoRA, arXiv 2305.14314); needs bitsandbytes"
    )
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "what is computed in; auto: bf16 on GPUs, fp32 on CPUs. bf16 is faster on CPUs with AVX512-BF16 or AMX, and "
        "slower on all others",
    )

    def in_bf16(self, *, on_gpu: bool) -> bool:
        """Whether a device of this kind computes in bf16. What is trained has fp32 masters everywhere."""
        return on_gpu if self.precision == "auto" else self.precision == "bf16"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning."""

    __pydantic_config__ = STRICT

    rank: Count = option(16, "rank of the update")
    alpha: Positive = option(32.0, "the update is scaled by alpha / rank")
    target_modules: Annotated[tuple[str, ...], Len(1)] | Literal["all-linear"] = option(
        "all-linear", "names of the modules that get an adapter"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """scored pairs -> policy"""

    __pydantic_config__ = STRICT
    section: ClassVar = "train"

    loss: Loss | Annotated[dict[Loss, Positive], Len(1)] = option(
        "sigmoid", "preference loss (docs/losses.md), or several with their weights: {sigmoid: 1.0, sft: 0.1}"
    )
    beta: Positive = option(
        0.1, "strength of the pull towards the reference (ipo: tau; orpo: lambda; simpo: scale); a sweep overrides it"
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = option(
        0.0, "assumed share of wrong labels; with sigmoid it is cDPO, with robust rDPO"
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = option(
        "reverse_kl", "between policy and reference (f-DPO, arXiv 2309.16240)"
    )
    divergence_alpha: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "of the alpha divergence: at 1 the reverse KL, at 0 the forward KL (1 minus the paper's alpha)"
    )
    ld_alpha: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "weight of answer tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411); null: 1"
    )
    wpo: bool = option(False, "weight pairs by how likely the policy is to give them (WPO, arXiv 2406.11827)")
    simpo_margin: Annotated[float, Ge(0)] = option(
        0.5, "simpo's gamma: chosen must lead by gamma / beta nats per token (the paper: beta 2 to 2.5)"
    )
    discopop_tau: Positive = option(0.05, "discopop's temperature")
    unlikelihood_alpha: Annotated[float, Ge(0)] = option(1.0, "unlikelihood's weight of the rejected answer")
    router_aux_loss: Annotated[float, Ge(0)] | None = option(
        None, "weight of a mixture of experts' balancing loss; null: the model's own"
    )
    learning_rate: Positive = option(5e-7, "peak learning rate; about 1e-6 for full fine-tuning, 1e-4 for LoRA")
    optimizer: Literal["adamw", "rmsprop"] = option("adamw", "rmsprop is the DPO paper's")
    weight_decay: Annotated[float, Ge(0)] = option(0.0, "decoupled weight decay (adamw)")
    schedule: Literal["constant", "linear", "cosine"] = option("linear", "after the warm-up")
    warmup_steps: Annotated[int, Ge(0)] = option(10, "steps of linear warm-up")
    max_grad_norm: Positive = option(1.0, "gradients are scaled down to this global norm")
    batch_pairs: Count = option(64, "pairs of one optimiser step, over all workers")
    epochs: Count = option(1, "passes over the training pairs")
    max_steps: Count | None = option(None, "stop after this many steps; default: all epochs")
    row_tokens: Count = option(2048, "tokens per packed row; one row is one micro-batch")
    checkpoint_steps: Count = option(50, "save what a resume needs every so many steps")
    evaluate_steps: Count = option(50, "measure the validation pairs every so many steps, and at the end")
    keep: Literal["last", "best"] = option("last", "which weights the training leaves: its last, or its best measured")
    best_metric: Literal["loss", "rewards/accuracy", "rewards/margin"] = option(
        "loss", "on the validation pairs, for train.keep=best and train.patience"
    )
    patience: Count | None = option(None, "stop after so many measurements without a better one; null: never")
    lora: LoraConfig | None = option(None, "train adapters; null: all weights")
    frozen: tuple[str, ...] = option(
        (), "modules whose weights stay as they are, by name or its end: [embed_tokens, layers.0]; of a full training"
    )


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """chosen answers -> the model that is aligned, where there is no SFT model yet (the paper's Preferred-FT)"""

    __pydantic_config__ = STRICT
    section: ClassVar = "sft"
    # What the training's loop asks of both kinds, and nobody can choose here.
    keep: ClassVar[Literal["last"]] = "last"
    best_metric: ClassVar[Literal["loss"]] = "loss"
    patience: ClassVar[None] = None

    enabled: bool = option(False, "fine-tune the model on the chosen answers first; what comes of it is the reference")
    learning_rate: Positive = option(1e-5, "peak learning rate; about 1e-5 for full fine-tuning, 1e-4 for LoRA")
    optimizer: Literal["adamw", "rmsprop"] = option("adamw", "as in train")
    weight_decay: Annotated[float, Ge(0)] = option(0.0, "decoupled weight decay (adamw)")
    schedule: Literal["constant", "linear", "cosine"] = option("linear", "after the warm-up")
    warmup_steps: Annotated[int, Ge(0)] = option(10, "steps of linear warm-up")
    max_grad_norm: Positive = option(1.0, "gradients are scaled down to this global norm")
    batch_pairs: Count = option(64, "pairs whose chosen answers make one optimiser step, over all workers")
    epochs: Count = option(1, "passes over the training pairs")
    max_steps: Count | None = option(None, "stop after this many steps; default: all epochs")
    row_tokens: Count = option(2048, "tokens per packed row; one row is one micro-batch")
    checkpoint_steps: Count = option(50, "save what a resume needs every so many steps")
    evaluate_steps: Count = option(50, "measure the validation pairs every so many steps, and at the end")
    lora: LoraConfig | None = option(None, "train adapters, which are merged at the end; null: all weights")
    frozen: tuple[str, ...] = option((), "as in train")


FitConfig: TypeAlias = TrainConfig | SftConfig
"""A training of either kind: the loop, the optimiser and the checkpoints read what both have."""
