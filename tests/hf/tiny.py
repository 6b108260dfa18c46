"""A tiny model, and what tests compare of two."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


def tiny_llama(seed: int = 0, **more: Any) -> nn.Module:
    """Two layers, untied; every weight is random. Weights of 96 columns have a ragged last group at 64."""
    values = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, **more}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() == 2 else 1.0, 0.1)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
