"""Preference losses from log-probs.

P: pairs, K: ranked answers. ``logps`` are natural logs, summed over the answer's tokens.
h is the log-ratio of the chosen answer minus that of the rejected one; log-ratio = log(policy / reference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_train.objective import DIVERGENCES, RULES, Kind, mistakes, weights_of


class PreferenceLoss(NamedTuple):
    """Per pair; not reduced, so that any split of a batch sums to the same."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a loss may be made of. Scores are the log-ratios, or what an f-divergence makes of them."""

    chosen_logps_P: Tensor
    rejected_logps_P: Tensor
    reference_chosen_logps_P: Tensor
    reference_rejected_logps_P: Tensor
    lengths_P: tuple[Tensor, Tensor] | None
    """Answer tokens of chosen and rejected; a loss that divides by them is refused without."""
    exists_PK: Tensor | None
    """Where there is a rejected answer, if rankings of different length stand side by side."""
    beta: float
    label_smoothing: float
    divergence: str
    divergence_alpha: float
    simpo_margin: float
    discopop_tau: float
    unlikelihood_alpha: float

    @property
    def chosen_ratio_P(self) -> Tensor:
        return self.chosen_logps_P - self.reference_chosen_logps_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        return self.rejected_logps_P - self.reference_rejected_logps_P

    @property
    def chosen_score_P(self) -> Tensor:
        return _score(self.chosen_ratio_P, self.divergence, self.divergence_alpha)

    @property
    def rejected_score_P(self) -> Tensor:
        return _score(self.rejected_ratio_P, self.divergence, self.divergence_alpha)

    @property
    def chosen_lengths_P(self) -> Tensor:
        assert self.lengths_P is not None
        return self.lengths_P[0]

    @property
    def rejected_lengths_P(self) -> Tensor:
        assert self.lengths_P is not None
        return self.lengths_P[1]

    @property
    def h_P(self) -> Tensor:
        return self.chosen_score_P - self.rejected_score_P

    @property
    def mean_h_P(self) -> Tensor:
        """h with each score divided by its answer's tokens."""
        return self.chosen_score_P / self.chosen_lengths_P - self.rejected_score_P / self.rejected_lengths_P

    @property
    def chosen_mean_logp_P(self) -> Tensor:
        return self.chosen_logps_P / self.chosen_lengths_P

    @property
    def rejected_mean_logp_P(self) -> Tensor:
        return self.rejected_logps_P / self.rejected_lengths_P


def preference_loss(
    policy_chosen_logps_P: Tensor,
    policy_rejected_logps_P: Tensor,
    reference_chosen_logps_P: Tensor,
    reference_rejected_logps_P: Tensor,
    *,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths_P: Tensor | None = None,
    rejected_lengths_P: Tensor | None = None,
    rejected_exists_PK: Tensor | None = None,
    weights_P: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    simpo_margin: float = 0.5,
    discopop_tau: float = 0.05,
    unlikelihood_alpha: float = 1.0,
) -> PreferenceLoss:
    """Loss and implicit rewards of each pair.

    The implicit reward is beta * log(policy / reference) (arXiv 2305.18290, section 4), whatever the loss; it carries
    no gradient here.

    Args:
        policy_chosen_logps_P: float tensor [P]; the other three alike. Only the policy's need a gradient. For
            plackett_luce the rejected ones may be [P, K - 1], from the second-best answer to the worst.
        kind: a key of ``LOSSES``, or several with their weights, such as ``{"sigmoid": 1.0, "sft": 0.1}``.
        beta: strength of the pull towards the reference; ipo's tau, orpo's lambda.
        label_smoothing: assumed share of wrong labels, in [0, 0.5).
        chosen_lengths_P: answer tokens [P]; needed by the losses that divide by them. The same for rejected.
        rejected_exists_PK: bool [P, K - 1], for rankings of different length: what stands elsewhere does not matter,
            be it NaN, and gets a gradient of zero.
        weights_P: factor of each pair's loss [P], such as ``wpo_weights``.
        divergence: between policy and reference, one of ``DIVERGENCES`` (arXiv 2309.16240).
        divergence_alpha: of the alpha divergence, in [0, 1]: at 1 the reverse KL, at 0 the forward KL. (1 minus the
            alpha of arXiv 2309.16240.)
        simpo_margin: gamma; chosen must lead by gamma / beta nats per token. The paper's beta is 2 to 2.5.
        discopop_tau: temperature of discopop's blend.
        unlikelihood_alpha: weight of the rejected answer.

    Returns:
        Losses and both rewards, float tensors [P]; rejected rewards of rankings [P, K - 1]. For aot and aot_unpaired
        entry i is that of the i-th smallest difference, not of pair i; the sum is what counts.

    Raises:
        ValueError: an unknown name, a number out of its range, a combination that makes no sense, or missing lengths.
    """
    weights = weights_of(kind)
    if rejected_exists_PK is not None:
        policy_rejected_logps_P, reference_rejected_logps_P = (
            torch.where(rejected_exists_PK, logps_P, 0.0)
            for logps_P in (policy_rejected_logps_P, reference_rejected_logps_P)
        )
    terms = Terms(
        chosen_logps_P=policy_chosen_logps_P,
        rejected_logps_P=policy_rejected_logps_P,
        reference_chosen_logps_P=reference_chosen_logps_P,
        reference_rejected_logps_P=reference_rejected_logps_P,
        lengths_P=None
        if chosen_lengths_P is None or rejected_lengths_P is None
        else (chosen_lengths_P, rejected_lengths_P),
        exists_PK=rejected_exists_PK,
        beta=beta,
        label_smoothing=label_smoothing,
        divergence=divergence,
        divergence_alpha=divergence_alpha,
        simpo_margin=simpo_margin,
        discopop_tau=discopop_tau,
        unlikelihood_alpha=unlikelihood_alpha,
    )
    wrong = mistakes(kind, label_smoothing=label_smoothing, divergence=divergence, wpo=weights_P is not None)
    if wrong := wrong or _out_of_range(weights, terms):
        raise ValueError("; ".join(wrong))
    losses_P = torch.stack([weight * LOSSES[name](terms) for name, weight in weights.items()]).sum(0)
    if weights_P is not None:
        losses_P = weights_P * losses_P
    return PreferenceLoss(losses_P, beta * terms.chosen_ratio_P.detach(), beta * terms.rejected_ratio_P.detach())


def _out_of_range(weights: Mapping[str, float], t: Terms) -> list[str]:
    found = []
    if not 0 < t.beta < math.inf:
        found.append(f"beta must be positive, got {t.beta}")
    if not 0 <= t.label_smoothing < 0.5:
        found.append(f"label_smoothing must lie in [0, 0.5), got {t.label_smoothing}")
    if t.divergence not in DIVERGENCES:
        found.append(f"unknown divergence {t.divergence!r}; known: {', '.join(DIVERGENCES)}")
    limits = {
        "divergence_alpha": 0 <= t.divergence_alpha <= 1,
        "simpo_margin": t.simpo_margin >= 0,
        "discopop_tau": t.discopop_tau > 0,
        "unlikelihood_alpha": t.unlikelihood_alpha >= 0,
    }
    found += [f"{name} is out of its range: {getattr(t, name)}" for name, is_fine in limits.items() if not is_fine]
    found += [f"the weight of {name} must be positive, got {w}" for name, w in weights.items() if not 0 < w < math.inf]
    if t.rejected_logps_P.ndim > 1 and set(weights) != {"plackett_luce"}:
        found.append("several rejected answers are for the plackett_luce loss alone")
    if t.lengths_P is None and (needy := [name for name in weights if RULES[name].lengths]):
        found.append(f"the {needy[0]} loss needs chosen_lengths_P and rejected_lengths_P")
    return found


def _score(ratio_P: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(policy / reference) by its logarithm, less a constant that cancels (arXiv 2309.16240, table 1)."""
    if divergence == "forward_kl":
        return -_expm1(-ratio_P)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(ratio_P)
    if divergence == "alpha" and alpha != 1:
        return _expm1((alpha - 1) * ratio_P) / (alpha - 1)
    return ratio_P


def _expm1(x_P: Tensor) -> Tensor:
    """e^x - 1, continued beyond 20 as the straight line that it touches there: e^80 is all that fp32 holds, and the
    slope of an answer that has become impossible must neither vanish nor drown all others."""
    return torch.expm1(x_P.clamp(max=20.0)) + math.exp(20.0) * torch.relu(x_P - 20.0)


def sigmoid(t: Terms) -> Tensor:
    """DPO, equation 7 of arXiv 2305.18290; with smoothing e cDPO (Mitchell, "A note on DPO with noisy preferences").

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
    """
    return _smoothed(t.beta * t.h_P, t.label_smoothing)


def robust(t: Terms) -> Tensor:
    """rDPO (arXiv 2403.00409): an unbiased estimate of the loss without the share e of flipped labels. It has no lower
    bound.

    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)
    """
    logits_P, e = t.beta * t.h_P, t.label_smoothing
    return (-(1 - e) * F.logsigmoid(logits_P) + e * F.logsigmoid(-logits_P)) / (1 - 2 * e)


def hinge(t: Terms) -> Tensor:
    """SLiC's ranking loss (arXiv 2305.10425), on log-ratios as in arXiv 2309.06657: max(0, 1 - beta h)."""
    return torch.relu(1 - t.beta * t.h_P)


def ipo(t: Terms) -> Tensor:
    """IPO, equation 17 of arXiv 2310.12036, on log-ratios per token: (mean h - 1 / (2 beta))^2."""
    return (t.mean_h_P - 1 / (2 * t.beta)) ** 2


def exo_pair(t: Terms) -> Tensor:
    """EXO for two answers, equation 16 of arXiv 2402.00856: KL(sigmoid(beta h), 1 - sigmoid || 1 - e, e)."""
    logits_P, e = t.beta * t.h_P, t.label_smoothing
    chosen_P = torch.sigmoid(logits_P) * (F.logsigmoid(logits_P) - math.log1p(-e))
    return chosen_P + torch.sigmoid(-logits_P) * (F.logsigmoid(-logits_P) - math.log(e))


def nca_pair(t: Terms) -> Tensor:
    """NCA for two answers (arXiv 2402.05369), rewards r: -log s(r_c) - (log s(-r_c) + log s(-r_r)) / 2."""
    chosen_P, rejected_P = t.beta * t.chosen_ratio_P, t.beta * t.rejected_ratio_P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def bco_pair(t: Terms) -> Tensor:
    """BCO on pairs (arXiv 2404.04656) without the reward shift: -log s(r_c) - log s(-r_r)."""
    return -F.logsigmoid(t.beta * t.chosen_ratio_P) - F.logsigmoid(-t.beta * t.rejected_ratio_P)


def sppo_hard(t: Terms) -> Tensor:
    """SPPO with hard labels, equation 4.7 of arXiv 2405.00675: (ratio_c - 1/(2 beta))^2 + (ratio_r + 1/(2 beta))^2."""
    return (t.chosen_ratio_P - 0.5 / t.beta) ** 2 + (t.rejected_ratio_P + 0.5 / t.beta) ** 2


def aot(t: Terms) -> Tensor:
    """AOT, paired (arXiv 2406.05882): the DPO loss between sorted log-prob differences of policy and reference."""
    policy_P = t.chosen_logps_P - t.rejected_logps_P
    reference_P = t.reference_chosen_logps_P - t.reference_rejected_logps_P
    return _smoothed(t.beta * (policy_P.sort().values - reference_P.sort().values), t.label_smoothing)


def aot_unpaired(t: Terms) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): the DPO loss between the sorted log-ratios of both sides."""
    difference_P = t.chosen_ratio_P.sort().values - t.rejected_ratio_P.sort().values
    return _smoothed(t.beta * difference_P, t.label_smoothing)


def apo_zero(t: Terms) -> Tensor:
    """APO-zero, equation 7 of arXiv 2408.06266, for answers better than the model's: 1 - s(r_c) + s(r_r)."""
    return torch.sigmoid(-t.beta * t.chosen_ratio_P) + torch.sigmoid(t.beta * t.rejected_ratio_P)


def apo_down(t: Terms) -> Tensor:
    """APO-down, equation 8 of arXiv 2408.06266, for answers worse than the model's: s(r_c) + 1 - s(r_c - r_r)."""
    difference_P = t.chosen_ratio_P - t.rejected_ratio_P
    return torch.sigmoid(t.beta * t.chosen_ratio_P) + torch.sigmoid(-t.beta * difference_P)


def discopop(t: Terms) -> Tensor:
    """DiscoPOP, equation 5 of arXiv 2406.08414: (1 - m) (-log s(x)) + m e^-x, with x = beta h and m = s(x / tau)."""
    logits_P = t.beta * t.h_P
    # m e^-x as one exponential: apart, e^-x overflows where m is zero.
    exponential_P = torch.exp(F.logsigmoid(logits_P / t.discopop_tau) - logits_P)
    return -F.logsigmoid(logits_P) * torch.sigmoid(-logits_P / t.discopop_tau) + exponential_P


def plackett_luce(t: Terms) -> Tensor:
    """DPO over rankings, equation 20 of arXiv 2305.18290 (appendix A.3); with one rejected answer it is sigmoid.

    -sum over k of log(exp(r_k) / sum over j >= k of exp(r_j)), r = beta * score, from the best answer to the worst.
    """
    rewards_PK = t.beta * torch.cat([_columns(t.chosen_score_P), _columns(t.rejected_score_P)], dim=1)
    if t.exists_PK is None:
        return (_log_remaining(rewards_PK) - rewards_PK).sum(-1)
    exists_PK = F.pad(t.exists_PK, (1, 0), value=True)
    # So low that it adds exactly nothing to a sum of exponentials, and finite: the slope at -inf is NaN.
    rewards_PK = torch.where(exists_PK, rewards_PK, torch.finfo(rewards_PK.dtype).min / 2)
    return torch.where(exists_PK, _log_remaining(rewards_PK) - rewards_PK, 0.0).sum(-1)


def sft(t: Terms) -> Tensor:
    """Cross-entropy of the chosen answer, mean over its tokens."""
    return -t.chosen_mean_logp_P


def sigmoid_norm(t: Terms) -> Tensor:
    """DPO on log-ratios per token (Tulu 3, arXiv 2411.15124): -log sigmoid(beta mean h)."""
    return -F.logsigmoid(t.beta * t.mean_h_P)


def simpo(t: Terms) -> Tensor:
    """SimPO, equation 6 of arXiv 2405.14734: -log sigmoid(beta (mean logp_c - mean logp_r) - gamma)."""
    return -F.logsigmoid(t.beta * (t.chosen_mean_logp_P - t.rejected_mean_logp_P) - t.simpo_margin)


def orpo(t: Terms) -> Tensor:
    """ORPO, equation 6 of arXiv 2403.07691: -mean logp_c - beta log sigmoid(log odds_c - log odds_r)."""
    difference_P = _log_odds(t.chosen_mean_logp_P) - _log_odds(t.rejected_mean_logp_P)
    return -t.chosen_mean_logp_P - t.beta * F.logsigmoid(difference_P)


def unlikelihood(t: Terms) -> Tensor:
    """The DPO paper's baseline (arXiv 2305.18290, section 6): -logp_c + alpha logp_r. It has no lower bound."""
    return -t.chosen_logps_P + t.unlikelihood_alpha * t.rejected_logps_P


LOSSES: dict[str, Callable[[Terms], Tensor]] = {
    function.__name__: function
    for function in (
        sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
        discopop, sigmoid_norm, plackett_luce, sft, simpo, orpo, unlikelihood,
    )
}  # fmt: skip


def wpo_weights(
    chosen_aligned_P: Tensor, rejected_aligned_P: Tensor, chosen_lengths_P: Tensor, rejected_lengths_P: Tensor
) -> Tensor:
    """WPO's weight of each pair (arXiv 2406.11827, equation 2): how likely the policy itself is to give both answers.

    Args:
        chosen_aligned_P: sum over the answer's tokens of log p(token) - log sum of p^2 over the vocabulary, which is
            what makes a token from the policy's own distribution weigh 1 on average.

    Returns:
        float [P], without gradient.
    """
    log_weight_P = chosen_aligned_P / chosen_lengths_P + rejected_aligned_P / rejected_lengths_P
    return torch.exp(log_weight_P).detach()


def _columns(values: Tensor) -> Tensor:
    """[P] or [P, K] as [P, K]."""
    return values[:, None] if values.ndim == 1 else values


def _log_remaining(rewards_PK: Tensor) -> Tensor:
    """log of the sum of exp over each answer and all that are ranked below it."""
    return torch.logcumsumexp(rewards_PK.flip(-1), dim=-1).flip(-1)


def _smoothed(logits_P: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(logits_P) - e * F.logsigmoid(-logits_P)


def _log_odds(mean_logp_P: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean log-prob), which stays below one by fp32's resolution."""
    capped_P = mean_logp_P.clamp(max=-torch.finfo(mean_logp_P.dtype).eps)
    return capped_P - torch.log(-torch.expm1(capped_P))
