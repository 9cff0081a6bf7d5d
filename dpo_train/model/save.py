"""A model's folder, written one weight after another. Whether it was sharded cannot be told from the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_train.model.weight_files import WeightWriter
from dpo_train.model.weight_names import as_stored, groups


def write_model(
    model: Any, folder: Path, *, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, keep: bool = True
) -> None:
    """Writes config and weights, these in the dtype that they have.

    With ``keep`` it holds one file's worth of weights on the CPU, and a layer's more where experts are stored singly;
    without it a single weight, and nothing is written.

    Args:
        model: without adapters.
        gather: a share to the whole, where weights are shares; then all ranks must call at once.
    """
    if keep:
        model.save_pretrained(folder, state_dict={})  # all but the weights
    writer = WeightWriter(folder) if keep else None
    weights = _stored_once(model)
    for names in groups(model, weights):
        group = {}
        for name in names:
            whole = gather(weights[name]).detach()
            if keep:
                group[name] = whole.cpu()
        if writer is not None:
            for name, tensor in as_stored(model, group).items():
                writer.add(name, tensor)
    if writer is not None:
        writer.finish(sum(parameter.numel() for parameter in model.parameters()))


def _stored_once(model: Any) -> dict[str, Tensor]:
    """Weights and stored buffers by name; tied ones under the name that others are tied to."""
    by_identity: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        by_identity.setdefault(id(tensor), []).append(name)
    left_out = set(model._keys_to_ignore_on_save or ())
    tied = set(model.all_tied_weights_keys)
    kept = (min(names, key=lambda name: (name in tied, name)) for names in by_identity.values())
    return {name: state[name] for name in kept if name not in left_out}
