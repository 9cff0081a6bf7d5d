"""Which of a checkpoint's tensors make which weight of a model.

Mostly one of the same name makes each. But transformers 5 keeps weights otherwise than many checkpoints do: it renames
some, adds or drops the decoder's prefix, and stacks a layer's experts into one weight. Its own rules are asked, so that
a model read by shares is the model that ``from_pretrained`` gives.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Box = tuple[slice, ...]
"""A part of a tensor, by dimension."""
Reader = Callable[[str, Box], Tensor]
"""Gives a part of a checkpoint's tensor."""
ALL: Box = (slice(None),)


@dataclass
class Origin:
    """The tensors that make a weight, and how."""

    parts: list[tuple[str, str | None]] = field(default_factory=list)
    """Names in the checkpoint, each with the pattern of the converter that it fits."""
    converter: Any | None = None
    """transformers' rule, if they do not simply make the weight by being there."""

    @property
    def by_pattern(self) -> dict[str, list[str]]:
        """The names that fit each of the converter's patterns, experts by their number."""
        found: dict[str, list[str]] = {}
        for name, pattern in self.parts:
            found.setdefault(str(pattern), []).append(name)
        return found

    @property
    def is_stack(self) -> bool:
        """Its rows are one tensor (of each pattern) each, as those of stacked experts are."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        if self.converter is None or len(self.converter.target_patterns) > 1:
            return False
        first, *others = self.converter.operations
        joins = all(type(other) is Concatenate and other.dim > 0 for other in others)
        return type(first) is MergeModulelist and first.dim == 0 and joins

    def read(self, weight: str, box: Box, reader: Reader, model: Any) -> dict[str, Tensor]:
        """A part of the weight, by its name; rows of a stack. Another converter gives all of all weights that it makes.

        So the rare weight that is, say, the transpose of what is stored is read whole by every rank, one at a time.
        """
        if self.converter is None:
            return {weight: reader(self.parts[0][0], box)}
        rule = deepcopy(self.converter)
        for pattern, names in self.by_pattern.items():
            for name in names[box[0]] if self.is_stack else names:
                rule.add_tensor(weight, name, pattern, lambda name=name: reader(name, ALL))
        made = rule.convert(weight, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def origins(model: Any, names: Iterable[str]) -> tuple[dict[str, Origin], list[str]]:
    """The origin of each weight that the checkpoint's names make, and the names that make none.

    Args:
        model: without adapters, on whatever device. It will be saved under the checkpoint's names again.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    weights, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Origin] = {}
    surplus = []
    for name in sorted(names, key=dot_natural_key):
        weight, pattern = rename_source_key(name, renamings, converters, prefix, weights)
        if weight not in weights and name in weights:
            weight, pattern = rename_source_key(name, [], [], prefix, weights)
        if weight not in weights or (pattern is None and weight in found):
            surplus.append(name)
            continue
        origin = found.setdefault(weight, Origin(converter=None if pattern is None else by_pattern[pattern]))
        origin.parts.append((name, pattern))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    return found, surplus


def unknown(model: Any, surplus: Iterable[str]) -> list[str]:
    """Those of the names without a weight that no checkpoint of this kind should have."""
    # Buffers that older versions stored; transformers leaves them aside for every model.
    known = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    return [name for name in surplus if not any(re.search(pattern, name) for pattern in known)]


def groups(model: Any, names: Iterable[str]) -> list[list[str]]:
    """A model's names of weights in the order of writing, in groups that can be stored one after another.

    A group is a single weight, or all of a layer where some rule takes several weights or makes several tensors of one.
    """
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    by_layer = any(isinstance(rule, WeightConverter) for rule in getattr(model, "_weight_conversions", None) or ())
    ordered = sorted(names, key=dot_natural_key)
    return [list(group) for _, group in itertools.groupby(ordered, _layer_of if by_layer else None)]


def _layer_of(name: str) -> str:
    """The name up to its first number: ``model.layers.3``."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def as_stored(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a group's weights are in a checkpoint such as the model's own, in the order of writing."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return stored
