"""Kubernetes' quantities as numbers. Pure."""

from __future__ import annotations

import re
from decimal import Decimal

_FACTORS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40), "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?[0-9]*\.?[0-9]+|[+-]?[0-9]+\.)(?:([eE][+-]?[0-9]+)|([numkMGTPE]i?|))")


def number(quantity: object) -> Decimal:
    """The number that "1500m", "16Gi" or "1e3" stands for.

    Raises:
        ValueError: it is no quantity.
    """
    found = _QUANTITY.fullmatch(str(quantity).strip())
    if found is None or (found[3] or "") not in _FACTORS:
        raise ValueError(f"{quantity!r} is no quantity of Kubernetes")
    return Decimal(found[1] + (found[2] or "")) * _FACTORS[found[3] or ""]


def shown(resource: str, value: Decimal) -> str:
    """A number for people: memory and storage in GiB, the rest as it is."""
    if any(word in resource for word in ("memory", "storage")):
        return f"{value / 2**30:.4g}Gi"
    return f"{value.normalize():f}"
