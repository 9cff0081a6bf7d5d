"""Shapes of well-known models, for who has no config.json at hand: sizes as their makers publish them."""

from __future__ import annotations

from typing import Any

from dpo_train.errors import ConfigError
from dpo_train.model.outline import config_of

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        },
    ),
    "llama-1b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
            "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True,
        },
    ),
    "llama-3b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
            "num_attention_heads": 24, "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
        },
    ),
    "llama-8b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
            "num_attention_heads": 32,
        },
    ),
    "llama-70b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672,
            "num_attention_heads": 64,
        },
    ),
    "llama-405b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248,
            "num_attention_heads": 128,
        },
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 1024, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "num_hidden_layers": 48, "moe_intermediate_size": 768, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
        },
    ),
}  # fmt: skip
"""Llama 3.1 and 3.2: arXiv 2407.21783, table 3, and their configs; Qwen2.5: arXiv 2412.15115, table 1; SmolLM2: its
config; OLMoE: arXiv 2409.02060; Qwen3: arXiv 2505.09388; Mixtral: arXiv 2401.04088, table 1."""

NAMES = tuple(_SHAPES)


def shape(name: str) -> Any:
    """The config of a shape.

    Raises:
        ConfigError: there is no such shape.
    """
    if name not in _SHAPES:
        raise ConfigError("--shape names no shape", got=name, expected=", ".join(NAMES))
    return config_of(*_SHAPES[name])
