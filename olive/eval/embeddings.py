"""Sentence embeddings of an encoder, and how far quantization moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from olive.eval.modes import device_of, evaluating


def mean_pooled(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
    """Sentence embeddings: the mean of the last hidden states over each sentence's tokens, at unit length.

    This is what sentence-transformers models with mean pooling and normalization do, all-MiniLM-L6-v2 for
    one. Means are computed in float32 even if the model computes in 16 bits.

    Args:
        model: an encoder of transformers, or anything that is called with the batch and returns
            `last_hidden_state` [B, T, H]; quantized or not. A module runs in eval mode and on its own device,
            and its training flags are restored.
        batch: keyword arguments of the model as a tokenizer gives them, among them `attention_mask` [B, T]:
            1 for tokens, 0 for padding.

    Returns:
        float32, or float64 if the model computes in that, [B, H]; rows have length 1, or 0 if all is 0.

    Raises:
        TypeError: `batch` is no mapping or has no mask, or the model's output has no hidden states.
        ValueError: mask and hidden states differ in shape, or a sentence has no tokens.

    Source: Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084, section 3, for the pooling.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping, got {type(batch).__name__}")
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"batch: expected a tensor called attention_mask, got {type(mask).__name__}")
    moved = dict(batch)
    if isinstance(model, nn.Module):
        device = device_of(model)
        moved = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
    # Not inference_mode: what a model caches in a forward would stay an inference tensor, unfit for training.
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        hidden = getattr(model(**moved), "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"model: expected an encoder, whose output has last_hidden_state [B, T, H], "
            f"got {type(model).__name__}"
        )
    if hidden.dim() != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"attention_mask: expected shape [B, T] of the hidden states {list(hidden.shape)}, "
            f"got {list(mask.shape)}"
        )
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = mask[..., None].to(hidden)
    counts = weights.sum(1)
    if not bool((counts > 0).all()):
        empty = int((counts[:, 0] <= 0).nonzero()[0])
        raise ValueError(f"attention_mask: expected at least one token per sentence, got none in row {empty}")
    return normalize((hidden * weights).sum(1) / counts, dim=1)


def embedding_distance(embeddings: Tensor, reference: Tensor) -> float:
    """Mean of 1 - cosine between embeddings and those of the original model, row by row.

    Args:
        embeddings: float [B, H], of any length.
        reference: float [B, H], likewise; dtype and device may differ.

    Returns:
        0 where all directions are the same, 1 where they are at right angles, at most 2; computed in float64.

    Raises:
        TypeError: an argument is no float tensor.
        ValueError: shapes that are not [B, H] or differ, no rows, a row of zeros, NaN or Inf.
    """
    pairs = {"embeddings": embeddings, "reference": reference}
    left, right = (_directions(one, name) for name, one in pairs.items())
    if left.shape != right.shape:
        raise ValueError(
            f"reference: expected the shape of embeddings, {list(left.shape)}, got {list(right.shape)}"
        )
    # 1 - cosine of unit vectors is half their squared distance: no cancellation where they are nearly equal.
    return float((left - right).square().sum(1).mean() / 2)


def _directions(rows: Tensor, name: str) -> Tensor:
    """Rows at unit length, float64 on the CPU."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name}: expected a float tensor, got {got}")
    if rows.dim() != 2 or 0 in rows.shape:
        raise ValueError(f"{name}: expected shape [B, H] with at least one row, got {list(rows.shape)}")
    wide = rows.detach().cpu().double()
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    for number, length in enumerate(lengths[:, 0].tolist()):
        if not 0 < length < float("inf"):
            what = "zeros" if length == 0 else "NaN or Inf"
            raise ValueError(f"{name}: expected rows with a direction, got {what} in row {number}")
    directions: Tensor = wide / lengths
    return directions
