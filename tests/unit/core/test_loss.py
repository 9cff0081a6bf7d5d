"""Preference losses against numbers worked by hand."""

from __future__ import annotations

import itertools
import math
import typing

import pytest
import torch
import torch.nn.functional as F

from dpo_train.config import TrainConfig
from dpo_train.core.loss import LOSSES, PreferenceLoss, preference_loss, wpo_weights
from dpo_train.decoding import section_types
from dpo_train.objective import DIVERGENCES, RULES, is_over_batch, mistakes

# Policy -10 and -12, reference -11 and -11: log-ratios +1 and -1, so h = 2. At beta 0.1 the logit is 0.2.
LOGPS = (-10.0, -12.0, -11.0, -11.0)


def _loss(*logps: float, **options: object) -> tuple[PreferenceLoss, torch.Tensor, torch.Tensor]:
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor([x], dtype=torch.float64) for x in logps)
    chosen.requires_grad_()
    rejected.requires_grad_()
    options = {"chosen_lengths_P": torch.ones(1), "rejected_lengths_P": torch.ones(1), **options}
    return preference_loss(chosen, rejected, reference_chosen, reference_rejected, **options), chosen, rejected


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "loss", "slope"),
    [
        # ln(1 + e^-0.2); slope -0.1 x sigmoid(-0.2) = -0.1 x 0.4501660027
        ("sigmoid", 0.1, 0.0, 0.5981388693815918, -0.04501660026875221),
        # ln(1 + e^-1); slope -0.5 x sigmoid(-1) = -0.5 x 0.2689414214
        ("sigmoid", 0.5, 0.0, 0.31326168751822286, -0.13447071068499755),
        # 0.9 x 0.5981388694 + 0.1 x (0.5981388694 + 0.2); slope 0.1 x (-0.9 x 0.4501660027 + 0.1 x 0.5498339973)
        ("sigmoid", 0.1, 0.1, 0.6181388693815918, -0.03501660026875221),
        # 1 - 0.1 x 2
        ("hinge", 0.1, 0.0, 0.8, -0.1),
        # 1 - 1 x 2 is negative: past the margin nothing pulls any more
        ("hinge", 1.0, 0.0, 0.0, 0.0),
        # (2 - 1 / 0.2)^2 = (-3)^2; slope 2 x -3
        ("ipo", 0.1, 0.0, 9.0, -6.0),
        # (2 - 1 / 1)^2; slope 2 x 1: beyond 1 / (2 beta) IPO pulls back
        ("ipo", 0.5, 0.0, 1.0, 2.0),
    ],
)
def test_loss_and_slope_are_the_closed_form(
    kind: str, beta: float, smoothing: float, loss: float, slope: float
) -> None:
    """The loss and its derivative by both log-probs; the two derivatives are opposite."""
    result, chosen, rejected = _loss(*LOGPS, kind=kind, beta=beta, label_smoothing=smoothing)
    result.losses_P.sum().backward()
    assert result.losses_P.item() == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(-slope, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_policy_that_equals_its_reference_has_loss_ln_2(beta: float) -> None:
    """With log-ratios of zero the DPO loss is ln 2 whatever beta, and its slope -beta / 2."""
    result, chosen, _ = _loss(-7.0, -30.0, -7.0, -30.0, beta=beta)
    result.losses_P.sum().backward()
    assert result.losses_P.item() == pytest.approx(math.log(2), rel=1e-12)
    assert chosen.grad.item() == pytest.approx(-beta / 2, rel=1e-12)


@pytest.mark.parametrize(("kind", "start"), [("hinge", 1.0), ("ipo", 25.0)])
def test_other_losses_start_at_their_known_value(kind: str, start: float) -> None:
    """Hinge starts at 1 and IPO at 1 / (2 beta)^2 = 25 for beta 0.1."""
    assert _loss(-7.0, -30.0, -7.0, -30.0, kind=kind, beta=0.1)[0].losses_P.item() == pytest.approx(start, rel=1e-12)


def test_smoothed_loss_is_lowest_at_the_assumed_confidence() -> None:
    """cDPO with smoothing e has its minimum where sigmoid(beta h) = 1 - e: at e = 0.2 and beta 1, h = ln 4."""
    result, chosen, _ = _loss(math.log(4), 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.2)
    result.losses_P.sum().backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_rewards_are_beta_times_the_log_ratio_without_gradient() -> None:
    """Rewards of +1 and -1 times 0.1; they are for reading, not for training."""
    result, _, _ = _loss(*LOGPS, beta=0.1)
    assert result.chosen_rewards_P.item() == pytest.approx(0.1, rel=1e-12)
    assert result.rejected_rewards_P.item() == pytest.approx(-0.1, rel=1e-12)
    assert not result.chosen_rewards_P.requires_grad
    assert not result.rejected_rewards_P.requires_grad


def test_swapping_the_answers_swaps_the_preference() -> None:
    """h becomes -h: the loss is ln(1 + e^0.2) = 0.5981388694 + 0.2."""
    chosen, rejected, reference_chosen, reference_rejected = LOGPS
    result, _, _ = _loss(rejected, chosen, reference_rejected, reference_chosen, beta=0.1)
    assert result.losses_P.item() == pytest.approx(0.7981388693815918, rel=1e-12)


def test_loss_is_per_pair_and_not_reduced() -> None:
    """Each pair's loss is that pair's alone, so that any split of a batch sums to the same."""
    columns = [torch.tensor(values) for values in ([-10.0, -7.0], [-12.0, -7.0], [-11.0, -7.0], [-11.0, -7.0])]
    losses = preference_loss(*columns, beta=0.1).losses_P
    assert losses.tolist() == pytest.approx([0.59813887, math.log(2)], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [(kind, name) for kind in LOSSES for name in DIVERGENCES if name == "reverse_kl" or RULES[kind].divergence],
)
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -5.0), (-5.0, -1e4), (-1e4, -1e4), (-1e-30, -1e-30)])
def test_huge_ratios_stay_finite_in_fp32(kind: str, divergence: str, chosen: float, rejected: float) -> None:
    """No exp overflows in a loss or a slope, whichever answer has become impossible or certain."""
    sides = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    reference, one = torch.tensor([-5.0]), torch.ones(1)
    smoothing = 0.1 if RULES[kind].smoothing == "required" else 0.0
    loss = preference_loss(
        *sides, reference, reference, kind=kind, beta=1.0, label_smoothing=smoothing, chosen_lengths_P=one,
        rejected_lengths_P=one, divergence=divergence,
    ).losses_P  # fmt: skip
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(side.grad is None or torch.isfinite(side.grad).all() for side in sides)
    if kind == "sigmoid" and divergence == "reverse_kl" and chosen == -1e4 and rejected == -5.0:
        assert loss.item() == pytest.approx(9995.0, rel=1e-6)
        assert sides[0].grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_alpha_next_to_one_keeps_its_digits_in_fp32() -> None:
    """(e^x - 1) / x for x = 1e-4: the naive difference loses four digits."""
    zero = torch.zeros(1)
    loss = preference_loss(torch.ones(1), zero, zero, zero, beta=1.0, divergence="alpha", divergence_alpha=0.9999)
    score = -math.expm1(-1e-4) / 1e-4
    assert loss.losses_P.item() == pytest.approx(math.log1p(math.exp(-score)), rel=1e-6)


# Mean log-probs per token: -10/2 = -5 and -12/4 = -3. Log odds of e^-5 and e^-3: -5 + 0.00676075 and -3 + 0.05106918
LENGTHS = {"chosen_lengths_P": torch.tensor([2.0]), "rejected_lengths_P": torch.tensor([4.0])}


@pytest.mark.parametrize(
    ("kind", "options", "loss", "chosen_slope", "rejected_slope"),
    [
        # ratio +1 over 2 tokens, -1 over 4: mean h = 0.75; (0.75 - 5)^2, slopes 2 x -4.25 over 2 and 4 tokens
        ("ipo", {}, 18.0625, -4.25, 2.125),
        # ln(1 + e^-0.075); slope -0.1 x sigmoid(-0.075) = -0.0481258785 over the tokens
        ("sigmoid_norm", {}, 0.6563501447, -0.0240629392, 0.0120314696),
        # 10 / 2
        ("sft", {}, 5.0, -0.5, 0.0),
        # x = 2 (-5 + 3) - 0.5 = -4.5; ln(1 + e^4.5); slope -2 x sigmoid(4.5) = -1.9780261147
        ("simpo", {"beta": 2.0, "simpo_margin": 0.5}, 4.5110478, -0.98901306, 0.49450653),
        # 5 + 0.1 ln(1 + e^2.04430843); its slope has a test of its own
        ("orpo", {}, 5.21660567, None, None),
        # 10 - 0.5 x 12
        ("unlikelihood", {"unlikelihood_alpha": 0.5}, 4.0, -1.0, 0.5),
    ],
)
def test_losses_by_length_and_without_reference_are_the_closed_form(
    kind: str, options: dict[str, float], loss: float, chosen_slope: float | None, rejected_slope: float | None
) -> None:
    """Worked by hand for answers of 2 and 4 tokens."""
    result, chosen, rejected = _loss(*LOGPS, kind=kind, **LENGTHS, **options)
    result.losses_P.sum().backward()
    assert result.losses_P.item() == pytest.approx(loss, rel=1e-6)
    if chosen_slope is not None:
        assert chosen.grad.item() == pytest.approx(chosen_slope, rel=1e-6)
        assert (0.0 if rejected.grad is None else rejected.grad.item()) == pytest.approx(rejected_slope, rel=1e-6)


def test_orpo_slope_is_that_of_the_odds() -> None:
    """d log odds / d logp = 1 / (1 - p): against a difference quotient."""
    step = 1e-6
    result, chosen, _ = _loss(*LOGPS, kind="orpo", **LENGTHS)
    result.losses_P.sum().backward()
    after = _loss(LOGPS[0] + step, *LOGPS[1:], kind="orpo", **LENGTHS)[0].losses_P.item()
    assert chosen.grad.item() == pytest.approx((after - result.losses_P.item()) / step, rel=1e-4)


def test_weighted_losses_add_up() -> None:
    """0.8 x sigmoid + 0.2 x sft of the numbers above."""
    result, _, _ = _loss(*LOGPS, kind={"sigmoid": 0.8, "sft": 0.2}, **LENGTHS)
    assert result.losses_P.item() == pytest.approx(0.8 * 0.5981388693815918 + 0.2 * 5.0, rel=1e-12)


def _ranking(policy_PK: torch.Tensor, reference_PK: torch.Tensor, beta: float) -> torch.Tensor:
    sides = (policy_PK[:, 0], policy_PK[:, 1:], reference_PK[:, 0], reference_PK[:, 1:])
    return preference_loss(*sides, kind="plackett_luce", beta=beta).losses_P


def test_plackett_luce_is_the_probability_of_the_ranking() -> None:
    """Rewards ln 3, ln 2, 0: the ranking has probability 3/6 x 2/3 x 1 = 1/3. Over all six rankings they sum to 1."""
    rewards = [math.log(3), math.log(2), 0.0]
    policy_PK = torch.tensor([rewards], dtype=torch.float64)
    assert _ranking(policy_PK, torch.zeros_like(policy_PK), 1.0).item() == pytest.approx(math.log(3), rel=1e-12)
    orders = torch.tensor(list(itertools.permutations(rewards)), dtype=torch.float64)
    assert torch.exp(-_ranking(orders, torch.zeros_like(orders), 1.0)).sum().item() == pytest.approx(1.0)


def test_plackett_luce_of_two_answers_is_dpo() -> None:
    """The same value and slopes as sigmoid, with one rejected answer as a vector or as a column."""
    result, chosen, rejected = _loss(*LOGPS)
    result.losses_P.sum().backward()
    policy_PK = torch.tensor([LOGPS[:2]], dtype=torch.float64, requires_grad=True)
    loss_P = _ranking(policy_PK, torch.tensor([LOGPS[2:]], dtype=torch.float64), 0.1)
    loss_P.sum().backward()
    assert loss_P.item() == pytest.approx(result.losses_P.item(), rel=1e-12)
    assert policy_PK.grad[0].tolist() == pytest.approx([chosen.grad.item(), rejected.grad.item()], rel=1e-12)
    assert _loss(*LOGPS, kind="plackett_luce")[0].losses_P.item() == pytest.approx(result.losses_P.item(), rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("padding", [0.0, 1e30, math.inf, math.nan])
def test_rankings_of_different_length_do_not_see_their_padding(padding: float, divergence: str) -> None:
    """Of 2 to 5 answers side by side: values and slopes are those of each alone; padding has a slope of zero."""
    generator = torch.Generator().manual_seed(0)
    policy_PK, reference_PK = (30 * torch.randn(4, 5, generator=generator) for _ in range(2))
    exists_PK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    padded_PK = torch.where(F.pad(exists_PK, (1, 0), value=True), policy_PK, padding).requires_grad_()
    options = {"kind": "plackett_luce", "divergence": divergence}
    sides = (padded_PK[:, 0], padded_PK[:, 1:], reference_PK[:, 0], reference_PK[:, 1:])
    losses_P = preference_loss(*sides, rejected_exists_PK=exists_PK, **options).losses_P
    losses_P.sum().backward()
    for index in range(4):
        end = index + 2
        alone_PK = policy_PK[index : index + 1, :end].clone().requires_grad_()
        reference = reference_PK[index : index + 1, :end]
        loss = preference_loss(alone_PK[:, 0], alone_PK[:, 1:], reference[:, 0], reference[:, 1:], **options).losses_P
        loss.sum().backward()
        assert torch.equal(losses_P[index], loss[0])
        assert torch.allclose(padded_PK.grad[index, :end], alone_PK.grad[0], rtol=1e-6, atol=0.0)
        assert (padded_PK.grad[index, end:] == 0).all()


def test_several_rejected_answers_are_for_rankings_alone() -> None:
    """Any other loss would broadcast them without a word."""
    logps_PK = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="several rejected answers are for the plackett_luce loss alone"):
        preference_loss(logps_PK[:, 0], logps_PK[:, 1:], logps_PK[:, 0], logps_PK[:, 1:])


def test_wpo_weight_is_one_for_a_typical_token() -> None:
    """log p = log sum p^2 at every token: weight 1; one nat below it over 2 tokens on one side: e^-1/2."""
    lengths = (torch.tensor([2.0, 2.0]), torch.tensor([3.0, 3.0]))
    weights_P = wpo_weights(torch.tensor([0.0, -1.0]), torch.zeros(2), *lengths)
    assert weights_P.tolist() == pytest.approx([1.0, math.exp(-0.5)], rel=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_start_alike(divergence: str) -> None:
    """Where policy and reference are one f' is f'(1) whatever f: the loss is ln 2 and its slope -beta / 2."""
    result, chosen, _ = _loss(-7.0, -30.0, -7.0, -30.0, beta=0.4, divergence=divergence)
    result.losses_P.sum().backward()
    slope = 0.5 if divergence == "js" else 1.0  # f''(1) is 1/2 for Jensen-Shannon, 1 for the others
    assert result.losses_P.item() == pytest.approx(math.log(2), rel=1e-12)
    assert chosen.grad.item() == pytest.approx(-0.2 * slope, rel=1e-12)


def test_alpha_divergence_lies_between_the_two_kl() -> None:
    """At 1 it is the reverse KL, at 0 the forward KL, at 0.5 neither."""
    losses = [_loss(*LOGPS, divergence="alpha", divergence_alpha=alpha)[0].losses_P.item() for alpha in (0.0, 0.5, 1.0)]
    assert losses[0] == pytest.approx(_loss(*LOGPS, divergence="forward_kl")[0].losses_P.item(), rel=1e-12)
    assert losses[2] == pytest.approx(_loss(*LOGPS)[0].losses_P.item(), rel=1e-12)
    assert min(losses[0], losses[2]) < losses[1] < max(losses[0], losses[2])


def test_config_names_every_loss() -> None:
    """The type in the config, the rules and the equations have the same names."""
    hint = typing.get_type_hints(TrainConfig)["loss"]
    assert section_types(hint) == ()
    (names,) = [part for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal]
    assert list(typing.get_args(names)) == list(RULES) == list(LOSSES)


def test_losses_of_a_batch_are_known() -> None:
    """Only these need the whole step's pairs; in a mixture one suffices."""
    assert [name for name in RULES if is_over_batch(name)] == ["aot", "aot_unpaired"]
    assert is_over_batch({"sigmoid": 1.0, "aot": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "unknown loss 'dpo'; known: sigmoid, robust, hinge, ipo"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"beta": float("inf")}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "got -0.1"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "label_smoothing has no meaning with the ipo loss"),
        (
            {"label_smoothing": 0.1, "kind": {"hinge": 1.0, "ipo": 1.0}},
            "no meaning with the hinge loss; .* the ipo loss",
        ),
        ({"label_smoothing": 0.1, "kind": {"sigmoid": 1.0, "hinge": 1.0}}, "no meaning with the hinge loss"),
        ({"discopop_tau": 0.0, "kind": "discopop"}, "discopop_tau is out of its range: 0.0"),
        ({"divergence": "alpha", "divergence_alpha": 1.5}, "divergence_alpha is out of its range"),
        ({"divergence": "js", "kind": "ipo"}, "js divergence has no meaning with the ipo loss, in which its constant"),
        ({"divergence": "js", "kind": "simpo"}, "the simpo loss, which has no reference"),
        ({"kind": "exo_pair"}, "exo_pair loss needs a label_smoothing above 0"),
        ({"kind": {}}, "no loss is named"),
        ({"kind": {"sigmoid": 0.0}}, "the weight of sigmoid must be positive"),
        ({"divergence": "kl"}, "unknown divergence 'kl'; known: reverse_kl"),
        ({"divergence": "js", "kind": "apo_zero"}, "js divergence has no meaning with the apo_zero loss"),
        ({"divergence": "js", "kind": "sft"}, "no meaning with the sft loss, which has no reference"),
        ({"kind": "aot", "weights_P": torch.ones(1)}, "wpo has no meaning with the aot loss"),
        ({"kind": "ipo", "chosen_lengths_P": None}, "the ipo loss needs chosen_lengths_P"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    """An option that would be ignored or divide by zero is an error."""
    with pytest.raises(ValueError, match=message):
        _loss(*LOGPS, **options)


def test_length_desensitisation_needs_a_log_ratio() -> None:
    """ld_alpha is applied before the loss sees its log-probs, so it is refused with the config."""
    assert mistakes("sigmoid", ld_alpha=0.5) == []
    (found,) = mistakes({"sigmoid": 1.0, "sft": 0.1}, ld_alpha=0.5)
    assert "ld_alpha has no meaning with the sft loss, which has no reference" in found
    (found,) = mistakes("sigmoid_norm", ld_alpha=0.5)
    assert "which divides by lengths already" in found


def test_option_that_no_loss_reads_is_refused() -> None:
    """Set on purpose and silently ignored would be a trap."""
    assert mistakes("simpo", options=["simpo_margin"]) == []
    (found,) = mistakes("sigmoid", options=["simpo_margin"])
    assert found == "simpo_margin has no meaning without the simpo loss"
    (found,) = mistakes("sigmoid", options=["divergence_alpha"])
    assert "divergence_alpha has no meaning with the reverse_kl divergence" in found


def test_smoothing_may_stand_beside_sft() -> None:
    """sft has one answer, and so no label that could be wrong."""
    assert mistakes({"sigmoid": 1.0, "sft": 0.1}, label_smoothing=0.1) == []
