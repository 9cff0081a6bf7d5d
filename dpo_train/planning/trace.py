"""What a row takes while it is computed: the engine's own forward and backward over tensors without numbers, counted.

Every operation's new storage counts from when it is made to when nothing refers to it any more, which is when torch's
allocator gets it back. Two and three layers are traced (more, where the first ones are of another kind); what a layer
adds is the difference, and the rest follows.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_train.config import LoraConfig
from dpo_train.core.router import aux_loss
from dpo_train.errors import ModelError, first_line
from dpo_train.model.outline import cut_config, fake_policy
from dpo_train.model.rows import Row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import layers
from dpo_train.model.transforms import transform_layers

Kind = Literal["copies", "gradients", "activations", "working"]
KINDS: tuple[Kind, ...] = ("copies", "gradients", "activations", "working")
"""copies: of fp32 weights in the dtype of the computation. activations: of a layer's forward, kept for its backward.
working: all else."""
PHASES = ("forward", "head", "last layer", "first layer")
"""Of a row: forward with its log-probs; backward of these; of the last layer; of the first one and what is below it.

In between, from layer to layer, activations are given back and gradients come: as many bytes each time."""

_FEW = 2
"""Layers that are traced, and one more. The first is not like the others: what is frozen below it wants no gradient."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a row is computed."""

    lora: LoraConfig | None
    checkpointing: Literal["off", "selective", "full"]
    on_gpu: bool
    """Attention by a kernel; else pair by pair."""
    bf16: bool
    trains: bool
    """Forward and backward; else forward alone."""
    full_weights: bool
    """Weights are fp32 although this row trains none of them: what is, or was, trained as a whole."""
    accumulates: bool = False
    """Gradients of a row before this one are there and are added to."""
    with_router: bool = False
    """The auxiliary loss of a mixture of experts is part of the row's."""


@dataclass(frozen=True)
class Peak:
    """Bytes by kind when a phase takes most, of a model with any number of layers: base + layers x slope."""

    base: Counter[Kind]
    slope: Counter[Kind]

    def at(self, num_layers: int) -> dict[Kind, float]:
        return {kind: self.base[kind] + num_layers * self.slope[kind] for kind in KINDS}


def trace(
    config: Any, way: Way, row: Row, lengths: list[list[int]], *, num_unlike: int = 0, trust: bool = False
) -> dict[str, Peak]:
    """The peak of each phase, without the weights, the gradients that were there before, and the optimiser.

    Args:
        num_unlike: layers at the beginning that do not stand for the others.

    Raises:
        ModelError: the model's forward cannot be followed without numbers.
    """
    found = []
    num_few = max(_FEW, num_unlike + 1)
    for num_layers in (num_few, num_few + 1):
        try:
            found.append(_trace(cut_config(config, num_layers=num_layers), way, row, lengths, trust=trust))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"The forward of this kind of model cannot be followed without numbers ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error
    few, more = found
    peaks = {}
    for phase in few:
        slope = Counter({kind: more[phase][kind] - few[phase][kind] for kind in KINDS})
        peaks[phase] = Peak(Counter({kind: few[phase][kind] - num_few * slope[kind] for kind in KINDS}), slope)
    return peaks


def _trace(config: Any, way: Way, row: Row, lengths: list[list[int]], *, trust: bool) -> dict[str, Counter[Kind]]:
    dtype = torch.bfloat16 if way.bf16 and not way.full_weights else torch.float32
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy = fake_policy(
        config, mode, dtype=dtype, bf16=way.bf16, lora=way.lora, trainable=way.trains, lengths=lengths,
        on_gpu=way.on_gpu, trust_remote_code=trust,
    )  # fmt: skip
    with mode:
        transform_layers(policy, checkpointing=way.checkpointing, compile=False, row_tokens=1)
        parameters = list(policy.model.parameters())
        if way.accumulates:
            for parameter in policy.trainable().values():
                parameter.grad = torch.zeros_like(parameter)
        live = Live(parameters)
        marks = _Marks(live, layers(policy))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_GroupedProducts())
            stack.enter_context(live)
            if not way.trains:
                stack.enter_context(torch.no_grad())
            marks.begin("forward")
            found = row_logps(policy, row, with_router=way.with_router)
            loss = found.token_logps_A.sum()
            if found.router is not None:
                loss = loss + aux_loss(*found.router)
        del found
        if way.trains:
            with _GroupedProducts(), live:
                marks.after_forward()
                marks.begin("head")
                torch.autograd.backward(loss)
        return marks.end()


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The product of a mixture's experts, of tensors without numbers; torch knows its shapes for bf16 alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, ends = args[:3]
        shape = [*left.shape[:-1], right.shape[-1]]
        if left.ndim == right.ndim == 2:  # the gradient of the experts' weights, one matrix each
            shape = [len(ends), *shape]
        return left.new_empty(shape)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that are alive of all that has been made inside, by kind."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[Kind] = Counter()
        self.on_change: Callable[[], None] = lambda: None
        self._kinds: dict[int, tuple[weakref.ref[Any], Kind, int]] = {}
        # Ids stay theirs: whoever calls holds the parameters.
        self._weights = {id(p.untyped_storage()) for p in parameters}
        self._known = self._weights | {id(p.grad.untyped_storage()) for p in parameters if p.grad is not None}
        self._held = [p.untyped_storage() for p in parameters]
        self._held += [p.grad.untyped_storage() for p in parameters if p.grad is not None]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._retag)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, "copies" if self._casts_weight(func, args) else "working")
        return result

    def _casts_weight(self, func: Any, args: Any) -> bool:
        is_cast = func is torch.ops.aten._to_copy.default
        return is_cast and id(args[0].untyped_storage()) in self._weights

    def _count(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = (weakref.ref(storage, lambda _: self._free(key)), kind, size)
        self.bytes[kind] += size
        self.on_change()

    def _free(self, key: int) -> None:
        _, kind, size = self._kinds.pop(key)
        self.bytes[kind] -= size

    def _retag(self, parameter: Tensor) -> None:
        """A new gradient has become a parameter's own."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._kinds:
            reference, kind, size = self._kinds[key]
            self._kinds[key] = (reference, "gradients", size)
            self.bytes[kind] -= size
            self.bytes["gradients"] += size

    def keep(self) -> None:
        """What is there now was kept on purpose."""
        for key, (reference, kind, size) in list(self._kinds.items()):
            if kind == "working":
                self._kinds[key] = (reference, "activations", size)
                self.bytes["working"] -= size
                self.bytes["activations"] += size


class _Marks:
    """The highest bytes of each phase; phases of the backward pass are told apart by the layers' inputs."""

    def __init__(self, live: Live, modules: list[torch.nn.Module]) -> None:
        self._live = live
        self._peaks: dict[str, Counter[Kind]] = {}
        self._phase = ""
        live.on_change = self._look
        modules[-1].register_forward_hook(self._watch("last layer"))
        modules[-2].register_forward_hook(self._watch("between"))
        # Those in the middle lie between the two others' peaks.
        modules[0].register_forward_hook(self._watch("first layer"))

    def begin(self, phase: str) -> None:
        self._phase = phase
        self._peaks.setdefault(phase, Counter())
        self._look()

    def after_forward(self) -> None:
        """Forward is over: what is alive is what backward wants. Of the forward's own peak so much was kept as well."""
        self._live.keep()
        kept, peak = self._live.bytes["activations"], self._peaks["forward"]
        moved = min(kept, peak["working"])
        peak["activations"] += moved
        peak["working"] -= moved

    def end(self) -> dict[str, Counter[Kind]]:
        return {phase: self._peaks[phase] for phase in PHASES if phase in self._peaks}

    def _watch(self, phase: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # A checkpointed layer's forward runs again during the backward pass, when the phase is known already.
            if hidden.requires_grad and self._phase == "forward":
                hidden.register_hook(lambda _: self.begin(phase))

        return hook

    def _look(self) -> None:
        if self._phase and self._live.bytes.total() > self._peaks[self._phase].total():
            self._peaks[self._phase] = Counter(self._live.bytes)
