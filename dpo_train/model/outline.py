"""A model from its config alone, to count what it would take: shapes without numbers, and nothing read but config.json.

    config.json, or a shape by name --read_config--> config --meta_model--> every weight's shape
                                                            --fake_policy--> a few layers that compute shapes alone

What a fake policy computes goes through the engine's own forward, adapters and checkpointing. Attention alone is given
the row's lengths by hand, because they cannot be read out of a tensor without numbers; on GPUs, where a compiled kernel
would run, an operation with the same inputs and outputs stands in for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_train.config import LoraConfig
from dpo_train.core.attention import pair_attention
from dpo_train.errors import ModelError, first_line
from dpo_train.model.adapters import fresh_adapter
from dpo_train.model.attention import NAME, install
from dpo_train.model.load import Policy

_OUTLINE = "dpo_outline"
"""Name of the stand-in attention in transformers."""


def read_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model folder, or of a hub name whose config.json has been fetched before. Nothing is downloaded.

    Raises:
        ModelError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    fix = "give a folder with a config.json, or name a shape with --shape"
    if Path(path).is_absolute() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"There is no config.json in {path}", fix=fix)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ModelError(f"The config of {path} cannot be read: {first_line(error)}", fix=fix) from None
    # What is planned is the model that these weights were made of: a stored quantisation cannot be trained.
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"The weights of {path} are stored quantised", fix="give the model that they were made of")
    return config


def config_of(kind: str, sizes: Mapping[str, Any]) -> Any:
    """A config by its kind ("llama") and sizes."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **sizes)


def text_config(config: Any) -> Any:
    """The part of a config that is about text."""
    return config.get_text_config()


def cut_config(config: Any, *, num_layers: int | None = None, tensor_parallel: int = 1) -> Any:
    """The same model with fewer layers, and with a tensor group's share of heads and hidden units on one rank.

    Raises:
        ModelError: heads or hidden units cannot be divided so.
    """
    config = copy.deepcopy(config)
    text = text_config(config)
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:num_layers]
    if tensor_parallel > 1:
        if getattr(text, "head_dim", None) is None:
            text.head_dim = text.hidden_size // text.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(text, name, None)
            if size is None or size % tensor_parallel:
                raise ModelError(
                    "The model cannot be cut by tensor parallelism",
                    got=f"{name}={size}",
                    expected=f"a multiple of compute.tensor_parallel={tensor_parallel}",
                )
            setattr(text, name, size // tensor_parallel)
    return config


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """All of the model on the meta device.

    Raises:
        ModelError: it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ModelError(f"The model cannot be laid out from its config: {first_line(error)}") from None


def fake_policy(
    config: Any,
    mode: FakeTensorMode,
    *,
    dtype: torch.dtype,
    bf16: bool,
    lora: LoraConfig | None,
    trainable: bool,
    lengths: Sequence[Sequence[int]],
    on_gpu: bool,
    trust_remote_code: bool = False,
) -> Policy:
    """A policy on the CPU whose tensors have no numbers, to be used inside the mode that makes them so.

    Args:
        config: of few layers (``cut_config``).
        mode: gives the tensors.
        dtype: of the weights; what is trained is fp32 all the same.
        bf16: what it is computed in. A CPU's autocast casts what a GPU's does, as far as a decoder goes.
        lengths: of each pair of the row that it will be asked for, the tokens of its prompt and answers.
        on_gpu: attention's memory is that of the GPU kernel, else that of attention pair by pair.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    # Made on the meta device: PEFT exchanges tensors in a way that fake ones refuse.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        ).eval()
        install(model)
        adapters = None if lora is None else fresh_adapter(model, lora, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and (lora is None or "lora_" in name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with mode:
        _onto_cpu(model)
    policy = Policy(model=model, adapters=adapters, folder=Path(), device=torch.device("cpu"), bf16=bf16)
    if not policy.layout.own_attention:
        AttentionInterface.register(_OUTLINE, _kernel if on_gpu else _pair_by_pair(lengths))
        AttentionMaskInterface.register(_OUTLINE, sdpa_mask)
        assert text_config(model.config)._attn_implementation == NAME
        model.set_attn_implementation(_OUTLINE)
    return policy


def _onto_cpu(model: nn.Module) -> None:
    """Gives a model of the meta device fake tensors on the CPU; tied ones stay one."""
    made: dict[int, Tensor] = {}

    def cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    parameters = {id(p): nn.Parameter(cpu(p), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({k: parameters[id(p)] for k, p in module._parameters.items() if p is not None})
        module._buffers.update({k: cpu(b) for k, b in module._buffers.items() if b is not None})


def _kernel(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """What FlexAttention keeps (queries, keys, values, its output, a number for each query and head), by an operation
    that selective checkpointing knows as well."""
    query, key = (x.to(value.dtype) for x in (query, key))
    found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
    return found.transpose(1, 2).contiguous(), None


def _pair_by_pair(lengths: Sequence[Sequence[int]]) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        found = pair_attention(query, key, value, lengths, scale=scaling, softcap=softcap)
        return found.transpose(1, 2).contiguous(), None

    return attention
