"""Every loss that TRL has, against TRL's own code: value and gradient, fp32.

``DPOTrainer._compute_loss`` is called on a stand-in for the trainer and for the model, which returns the per-token
log-probs that we choose; the loss it computes from them is TRL's. Losses of a pair are compared pair by pair, those of
a batch over one.

P: pairs, T: answer tokens of the longest answer.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_train.core.loss import LOSSES, PreferenceLoss, preference_loss, wpo_weights
from dpo_train.objective import RULES, mistakes

DPOTrainer: Any = pytest.importorskip("trl").DPOTrainer

NUM_PAIRS = 6
NOT_IN_TRL = {"simpo", "orpo", "unlikelihood", "plackett_luce"}
# label_smoothing is zero for sigmoid: TRL ignores it there (docs/losses.md).
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
TRL_DIVERGENCES = {
    "reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence",
}  # fmt: skip


class Batch:
    """Random per-token log-probs of pairs with ragged answers, as leaves; reference log-probs near them."""

    def __init__(self, num_pairs: int = NUM_PAIRS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.chosen_lengths_P = torch.randint(1, 9, (num_pairs,), generator=generator)
        self.rejected_lengths_P = torch.randint(1, 9, (num_pairs,), generator=generator)
        self.chosen_PT = -torch.rand(num_pairs, 9, generator=generator) * 3
        self.rejected_PT = -torch.rand(num_pairs, 9, generator=generator) * 3
        self.chosen_square_PT = -torch.rand(num_pairs, 9, generator=generator)
        self.rejected_square_PT = -torch.rand(num_pairs, 9, generator=generator)
        for name in ("chosen", "rejected"):
            lengths_P = getattr(self, f"{name}_lengths_P")
            mask_PT = torch.arange(9)[None] < lengths_P[:, None]
            setattr(self, f"{name}_mask_PT", mask_PT)
            for kind in ("", "_square"):
                setattr(self, f"{name}{kind}_PT", getattr(self, f"{name}{kind}_PT") * mask_PT)
            noise_P = torch.randn(num_pairs, generator=generator)
            setattr(self, f"reference_{name}_P", getattr(self, f"{name}_PT").sum(1) + noise_P)

    def only(self, index: int) -> Batch:
        """The same with one pair."""
        one = object.__new__(Batch)
        for name, value in vars(self).items():
            setattr(one, name, value[index : index + 1].detach().clone())
        return one

    def with_gradient(self) -> Batch:
        self.chosen_PT = self.chosen_PT.detach().requires_grad_()
        self.rejected_PT = self.rejected_PT.detach().requires_grad_()
        return self

    @property
    def gradient(self) -> Tensor:
        """By answer tokens; what lies behind an answer's end is no token."""
        sides = ((self.chosen_PT.grad, self.chosen_mask_PT), (self.rejected_PT.grad, self.rejected_mask_PT))
        return torch.cat([torch.zeros(mask.shape) if grad is None else grad * mask for grad, mask in sides])


def _trl(batch: Batch, kind: str | dict[str, float], **options: Any) -> Tensor:
    """TRL's scalar loss of the batch."""
    weights = {kind: 1.0} if isinstance(kind, str) else kind
    both_PT = torch.cat([batch.chosen_PT, batch.rejected_PT])
    answer_PT = torch.cat([batch.chosen_mask_PT, batch.rejected_mask_PT])
    # TRL's sequences have a token more than there are predictions: one of the prompt, which is not an answer's.
    mask_PT = torch.cat([torch.zeros_like(answer_PT[:, :1]), answer_PT], dim=1).long()
    squares_PT = torch.cat([batch.chosen_square_PT, batch.rejected_square_PT])
    outputs = SimpleNamespace(
        log_probs=both_PT,
        log_sum_sq_probs=squares_PT,
        entropy=torch.zeros_like(both_PT),
        mean_logits=torch.zeros_like(both_PT),
        is_top1=torch.zeros_like(answer_PT),
    )
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        ld_alpha=options.get("ld_alpha"),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        f_divergence_type=TRL_DIVERGENCES[options.get("divergence", "reverse_kl")],
        f_alpha_divergence_coef=options.get("divergence_alpha", 0.5),
        use_weighting=options.get("wpo", False),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask_PT),
        "attention_mask": mask_PT,
        "completion_mask": mask_PT,
        "ref_chosen_logps": batch.reference_chosen_P,
        "ref_rejected_logps": batch.reference_rejected_P,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss


def _ours(batch: Batch, kind: str | dict[str, float], **options: Any) -> PreferenceLoss:
    lengths = (batch.chosen_lengths_P, batch.rejected_lengths_P)
    weights_P = None
    if options.pop("wpo", False):
        aligned = [
            (batch.chosen_PT - batch.chosen_square_PT).sum(1), (batch.rejected_PT - batch.rejected_square_PT).sum(1),
        ]  # fmt: skip
        weights_P = wpo_weights(*aligned, *lengths)
    return preference_loss(
        batch.chosen_PT.sum(1),
        batch.rejected_PT.sum(1),
        batch.reference_chosen_P,
        batch.reference_rejected_P,
        kind=kind,
        chosen_lengths_P=lengths[0],
        rejected_lengths_P=lengths[1],
        weights_P=weights_P,
        **options,
    )


def _assert_same(batch: Batch, kind: str | dict[str, float], **options: Any) -> None:
    """Value and gradient by every token, 1e-5 relative."""
    theirs, ours = _copy(batch), _copy(batch)
    wanted = _trl(theirs.with_gradient(), kind, **options)
    wanted.backward()
    got = _ours(ours.with_gradient(), kind, **options).losses_P.mean()
    got.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    scale = theirs.gradient.abs().max()
    assert scale > 1e-6
    # discopop's gradient is a difference of terms of size beta, which may all but cancel.
    scale = max(scale, options["beta"]) if kind == "discopop" else scale
    assert (ours.gradient - theirs.gradient).abs().max() <= 1e-5 * scale


def _copy(batch: Batch) -> Batch:
    copy = object.__new__(Batch)
    vars(copy).update({name: value.detach().clone() for name, value in vars(batch).items()})
    return copy


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("kind", [name for name in LOSSES if name not in NOT_IN_TRL])
def test_loss_and_gradient_are_those_of_trl(kind: str, beta: float) -> None:
    """Pair by pair, or over the batch where the loss is defined on one."""
    batch = Batch(seed=1)
    options = {"beta": beta, "label_smoothing": SMOOTHING.get(kind, 0.0)}
    if RULES[kind].whole_batch:
        _assert_same(batch, kind, **options)
        return
    for index in range(NUM_PAIRS):
        _assert_same(batch.only(index), kind, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("kind", [name for name, rule in RULES.items() if rule.divergence and name not in NOT_IN_TRL])
def test_divergences_are_those_of_trl(kind: str, divergence: str) -> None:
    """Every loss on a reward difference, under every divergence."""
    for index in range(NUM_PAIRS):
        _assert_same(
            Batch(seed=2).only(index), kind, beta=0.3, label_smoothing=SMOOTHING.get(kind, 0.0), divergence=divergence,
            divergence_alpha=0.3,
        )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    # TRL 1.16 weights in place, which PyTorch refuses after hinge's relu: its own backward fails there.
    [name for name, rule in RULES.items() if name not in {*NOT_IN_TRL, "hinge"} and not rule.whole_batch],
)
def test_wpo_weighting_is_that_of_trl(kind: str) -> None:
    """Each pair's loss times how likely the policy is to give both answers; the weight has no gradient."""
    for index in range(NUM_PAIRS):
        _assert_same(Batch(seed=3).only(index), kind, beta=0.1, label_smoothing=SMOOTHING.get(kind, 0.0), wpo=True)


def test_weighted_sum_is_that_of_trl() -> None:
    """MPO's mixture (arXiv 2411.10442): sigmoid, bco_pair and sft."""
    for index in range(NUM_PAIRS):
        _assert_same(Batch(seed=4).only(index), {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})


def test_what_differs_on_purpose_does_differ() -> None:
    """TRL ignores smoothing for sigmoid, and averages sft over a micro-batch's tokens (docs/losses.md)."""
    batch = Batch(seed=5)
    smoothed = _ours(batch, "sigmoid", label_smoothing=0.2).losses_P.mean().item()
    assert smoothed != pytest.approx(_trl(batch, "sigmoid", label_smoothing=0.2).item(), rel=1e-3)
    assert _ours(batch, "sft").losses_P.mean().item() != pytest.approx(_trl(batch, "sft").item(), rel=1e-3)


def test_trl_has_no_loss_that_is_missing_here() -> None:
    """Its own list of names, read from the error it raises for an unknown one."""
    with pytest.raises(ValueError) as caught:
        _trl(Batch(), "none of these")
    names = set(str(caught.value).partition("[")[2].rstrip("]").replace("'", "").split(", "))
    assert names == set(LOSSES) - NOT_IN_TRL
    assert all(not mistakes(name, label_smoothing=SMOOTHING.get(name, 0.0)) for name in names)
