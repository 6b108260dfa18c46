"""Tiny models to train, and a batch for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 5  # four patches and the class token


def tiny_vit(seed: int = 0, **more: Any) -> nn.Module:
    """Two layers on four patches."""
    from transformers import ViTConfig, ViTForImageClassification

    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    values |= {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 5, **more}
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**values))


def images(seed: int = 0, count: int = 6) -> dict[str, Tensor]:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 5, (count,), generator=generator),
    }


def tiny_llama(seed: int = 0, **more: Any) -> nn.Module:
    """Two layers; the head is tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **more}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**values))


def tokens(seed: int = 0, count: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Random token ids, which are their own labels."""
    ids = torch.randint(0, 61, (count, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], steps: int
) -> list[float]:
    """A few steps on one batch; the losses."""
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
