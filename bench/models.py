"""Language models with random weights: they generate nonsense at the speed of real ones."""

from __future__ import annotations

from typing import Any

import torch

TINYLLAMA: dict[str, Any] = {  # 1.1 B parameters
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {**TINYLLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}


def random_llama(shape: dict[str, Any], device: torch.device | None = None) -> Any:
    """A Llama of that shape with random bfloat16 weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, dtype=torch.bfloat16, max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device or torch.device("cpu"):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()
