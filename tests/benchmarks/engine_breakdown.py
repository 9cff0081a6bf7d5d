"""Where one of our steps spends its time, by hooks on the modules and tensors of a Llama.

The clock belongs to one part at a time; a hook hands it on. Nothing in the engine is changed or known beyond its model.
On GPUs each hook waits for the device, so that parts do not overlap there as they do in a real step. What runs between
the projections to queries, keys and values and the projection of what they give counts as attention, rotary embeddings
included; the projections themselves are "layers". Forwards that the backward pass repeats count as forward.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dpo_train.data.batches import rank_rows
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.train.optimizer import build_optimizer
from tests.benchmarks import engine_ours
from tests.benchmarks.engine_turns import Spec, Turns

ATTENTION, LAYERS, VOCABULARY = "attention", "layers but attention", "vocabulary matrix"
OPTIMISER, DATA, REST = "optimiser", "packing and rows", "clipping, metrics, rest"
PARTS = (
    *(f"{part}, {way}" for part in (ATTENTION, LAYERS, VOCABULARY) for way in ("forward", "backward")),
    OPTIMISER,
    DATA,
    REST,
)


class Clock:
    """Seconds by part."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.seconds: dict[str, float] = defaultdict(float)
        self._part, self._last = REST, 0.0

    def start(self) -> None:
        self.seconds.clear()
        self._part, self._last = REST, self._turns.now()

    def switch(self, part: str) -> None:
        """The time so far belongs to the part that ends here."""
        now = self._turns.now()
        self.seconds[self._part] += now - self._last
        self._part, self._last = part, now

    def on_gradient(self, tensor: Any, part: str) -> None:
        """Switches when the backward pass reaches this tensor."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.switch(part))


def run(spec: Spec, turns: Turns) -> None:
    """As engine_ours.run, with ``parts`` beside each step."""
    turns.imported()
    policy, config = engine_ours.load(spec), engine_ours.config_of(spec)
    scored, seconds = engine_ours.reference(policy, spec, turns)
    optimizer = build_optimizer(policy.trainable().values(), config)
    clock = Clock(turns)
    watch(policy, clock)
    optimizer.register_step_pre_hook(lambda *_: clock.switch(OPTIMISER))
    optimizer.register_step_post_hook(lambda *_: clock.switch(REST))
    turns.ready(reference_seconds=seconds)
    step = 0
    while turns.wait():
        pairs = scored[step % len(scored)]
        clock.start()
        loss = engine_ours.one_step(policy, optimizer, pairs, config, step)
        clock.switch(REST)
        parts = dict(clock.seconds)
        # Done once more by itself: inside the step nothing tells it from what stands around it.
        start = turns.now()
        for members in rank_rows([pair.num_tokens for pair in pairs], spec.row_tokens, 1)[0]:
            build_row([pairs[index] for index in members]).to(policy.device)
        parts[DATA] = turns.now() - start
        parts[REST] = max(0.0, parts[REST] - parts[DATA])
        turns.done(loss, parts=parts)
        step += 1


def watch(policy: Policy, clock: Clock) -> None:
    """Hooks on everything that hands the clock on."""
    decoder: Any = policy.model.get_decoder()
    layers_forward, layers_backward = f"{LAYERS}, forward", f"{LAYERS}, backward"

    def decoder_ends(_: Any, __: Any, output: Any) -> None:
        clock.on_gradient(output.last_hidden_state, layers_backward)
        clock.switch(f"{VOCABULARY}, forward")

    def row_ends(_: Any, __: Any, output: Any) -> None:
        clock.on_gradient(output.token_logps_A, f"{VOCABULARY}, backward")
        clock.switch(REST)

    def projected(_: Any, __: Any, output: Any) -> None:
        clock.on_gradient(output, layers_backward)
        clock.switch(f"{ATTENTION}, forward")

    def attended(_: Any, inputs: Any) -> None:
        clock.on_gradient(inputs[0], f"{ATTENTION}, backward")
        clock.switch(layers_forward)

    policy.packed.register_forward_pre_hook(lambda *_: clock.switch(layers_forward))
    policy.packed.register_forward_hook(row_ends)
    decoder.register_forward_hook(decoder_ends)
    for layer in decoder.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).register_forward_hook(
                lambda _, __, output: clock.on_gradient(output, layers_backward)
            )
        attention.v_proj.register_forward_hook(projected)
        attention.o_proj.register_forward_pre_hook(attended)
    embedding: Any = policy.model.get_input_embeddings()
    embedding.weight.register_post_accumulate_grad_hook(lambda _: clock.switch(REST))
