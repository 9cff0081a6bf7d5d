"""A base in 4 bits under adapters (QLoRA, arXiv 2305.14314), through bitsandbytes.

Linear modules' weights become NF4 numbers in blocks of 64 with a scale each, the scales 8-bit numbers in blocks of 256
(double quantisation: 4.13 bits a weight). Embeddings, the vocabulary matrix, norms and the experts of a mixture, which
are no linear modules in transformers, stay as they are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from dpo_train.config import ModelConfig
from dpo_train.errors import MissingPackageError, ModelError


def load_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained``, to compute in ``model.precision``.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("model.quantization=nf4 needs bitsandbytes", fix="pip install 'dpo-train[qlora]'")
    from transformers import BitsAndBytesConfig

    bf16 = config.in_bf16(on_gpu=device.type == "cuda")
    return {
        # Quantised on the device itself: a whole base never stands in a GPU's memory.
        "device_map": {"": str(device)},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        ),
    }


def check_stored(model: Any, folder: Path, *, wanted: bool) -> None:
    """Whether a loaded model is quantised exactly if it was to be; makes it compute the same everywhere.

    Raises:
        ModelError: it was stored quantised, or has nothing to quantise.
    """
    stored = getattr(model, "is_quantized", False) and (not wanted or model.hf_quantizer.pre_quantized)
    if stored:
        method = model.hf_quantizer.quantization_config.quant_method
        raise ModelError(
            f"The weights in {folder} are stored quantised",
            got=f"quantization_config in its config.json, method {method.value}",
            expected="weights in fp32, fp16 or bf16; model.quantization=nf4 quantises them when they are loaded",
            fix="give the folder of the model that these were made of",
        )
    if not wanted:
        return
    if not (modules := _quantised(model)):
        raise ModelError(f"model.quantization: the model in {folder} has no linear modules to quantise")
    for module in modules.values():
        # On CPUs with AVX512-BF16, bitsandbytes turns a weight in place into a form that computes in bf16 and lets no
        # gradient through, at the first forward whose input wants none: a policy would differ from its reference.
        module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def take_rounded(plain: Any, quantised: Any) -> None:
    """Gives a plain model the weights that the quantised one computes with: what was measured is what is merged into.

    PEFT's own merging would round the sum to 4 bits again, and so lose most of the update.
    """
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    for name, module in _quantised(quantised).items():
        weight_OI = dequantize_4bit(module.weight.data, module.weight.quant_state)
        target = plain.get_submodule(name)
        target.weight.copy_(weight_OI.T if isinstance(target, Conv1D) else weight_OI)


def _quantised(model: Any) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
