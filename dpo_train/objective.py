"""Which losses there are, and what goes with which. Free of torch: a config that makes no sense is refused at once.

The equations are in core/loss.py; a test holds both tables to the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = str | Mapping[Any, float]
"""A loss by name, or several with their weights."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a loss takes and needs."""

    smoothing: Literal["none", "possible", "required"] = "none"
    divergence: bool = False
    """It is made of the difference of both answers' rewards, in which an f-divergence's constant cancels; divided by
    the answers' lengths it would not."""
    lengths: bool = False
    """It divides by the number of answer tokens."""
    whole_batch: bool = False
    """One pair's loss depends on the other pairs of the step."""
    reference_free: bool = False
    """It never looks at the reference."""


RULES: Mapping[str, Rule] = {
    "sigmoid": Rule(smoothing="possible", divergence=True),
    "robust": Rule(smoothing="possible", divergence=True),
    "hinge": Rule(divergence=True),
    "ipo": Rule(lengths=True),
    "exo_pair": Rule(smoothing="required", divergence=True),
    "nca_pair": Rule(),
    "bco_pair": Rule(),
    "sppo_hard": Rule(),
    "aot": Rule(smoothing="possible", whole_batch=True),
    "aot_unpaired": Rule(smoothing="possible", whole_batch=True),
    "apo_zero": Rule(),
    "apo_down": Rule(),
    "discopop": Rule(divergence=True),
    "sigmoid_norm": Rule(lengths=True),
    "plackett_luce": Rule(divergence=True),
    "sft": Rule(lengths=True, reference_free=True),
    "simpo": Rule(lengths=True, reference_free=True),
    "orpo": Rule(lengths=True, reference_free=True),
    "unlikelihood": Rule(reference_free=True),
}
"""Every loss that preference_loss knows by name."""

OPTION_OF = {"simpo_margin": "simpo", "discopop_tau": "discopop", "unlikelihood_alpha": "unlikelihood"}
"""Options that one loss alone reads."""

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def weights_of(kind: Kind) -> dict[str, float]:
    """A single loss, or several with their weights, as weights by name."""
    return {kind: 1.0} if isinstance(kind, str) else dict(kind)


def is_over_batch(kind: Kind) -> bool:
    """Whether some member's loss of one pair depends on the step's other pairs."""
    return any(RULES[name].whole_batch for name in weights_of(kind))


def is_reference_free(kind: Kind) -> bool:
    """Whether no member looks at the reference."""
    return all(RULES[name].reference_free for name in weights_of(kind) if name in RULES)


def mistakes(
    kind: Kind,
    *,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    ld_alpha: float | None = None,
    wpo: bool = False,
    options: Collection[str] = (),
) -> list[str]:
    """What makes no sense about a combination, each as a sentence that names its parts; empty if all is well.

    Args:
        options: names of those in ``OPTION_OF``, and ``divergence_alpha``, that were set on purpose.
    """
    names = list(weights_of(kind))
    if not names:
        return ["no loss is named"]
    if unknown := [name for name in names if name not in RULES]:
        return [f"unknown loss {unknown[0]!r}; known: {', '.join(RULES)}"]
    rules = [RULES[name] for name in names]
    # sft may go with anything: it has one answer, and so no label that could be wrong.
    others = [(name, rule) for name, rule in zip(names, rules, strict=True) if name != "sft" or len(names) == 1]
    found = [
        f"label_smoothing has no meaning with the {name} loss"
        for name, rule in others
        if label_smoothing and rule.smoothing == "none"
    ]
    found += [
        f"{option} has no meaning without the {name} loss"
        for option, name in OPTION_OF.items()
        if option in options and name not in names
    ]
    if "divergence_alpha" in options and divergence != "alpha":
        found.append(f"divergence_alpha has no meaning with the {divergence} divergence")
    found += [
        f"the {name} loss needs a label_smoothing above 0 (its paper takes 1e-3)"
        for name, rule in zip(names, rules, strict=True)
        if rule.smoothing == "required" and not label_smoothing
    ]
    if divergence != "reverse_kl":
        found += [
            f"the {divergence} divergence has no meaning with the {name} loss, "
            + ("which has no reference" if rule.reference_free else "in which its constant does not cancel")
            for name, rule in others
            if not rule.divergence
        ]
    if ld_alpha is not None:
        found += [
            f"ld_alpha has no meaning with the {name} loss, "
            + ("which has no reference" if rule.reference_free else "which divides by lengths already")
            for name, rule in zip(names, rules, strict=True)
            if rule.reference_free or rule.lengths
        ]
    if wpo:
        found += [
            f"wpo has no meaning with the {name} loss, which sorts the pairs of a step"
            for name, rule in zip(names, rules, strict=True)
            if rule.whole_batch
        ]
    return found
