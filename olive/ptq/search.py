"""From a float weight to codes, scales and a codebook: what is searched for which configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.config import QuantConfig
from olive.formats.codebooks import Codebook
from olive.ops.schemas import FLOATS
from olive.ptq.choose import choose_codebook
from olive.ptq.grids import search_grids, search_grids8


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in the stored form of `olive.formats`, 4 bits."""

    codes: Tensor  # uint8 [N, ceil(K / 2)]
    scale: Tensor  # int16 [N, G]
    codebook: Tensor  # int8 [32]


class QuantizedWeight8(NamedTuple):
    """The same in 8 bits."""

    codes: Tensor  # uint8 [N, 2 ceil(K / 2)]
    scale: Tensor  # int16 [N, G]


def quantize_weight(
    weight: Tensor,
    config: QuantConfig,
    *,
    importance: Tensor | None = None,
    codebook: Codebook | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize one weight to 4 bits by the search that the configuration names, on the device it is on.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        config: codebook, group size and method; "gptq" needs more than a weight and searches here.
        importance: float32 [K], from 0 to 2^64, weighs the squared error of each column; None = all alike.
        codebook: one that was chosen before; None = as the configuration says.
        name: what to call the weight in errors.

    Raises:
        ValueError: not two-dimensional, empty, or not finite; a configuration of 8 bits; importance with
            method "paper", which has none.
        TypeError: not a float type.
    """
    weight = checked(weight, name)
    if config.bits != 4:
        raise ValueError(f"config: expected bits=4, got {config.bits}; see quantize_weight8")
    if importance is not None and config.method == "paper":
        raise ValueError("importance: expected None with method 'paper', got a tensor")
    book = codebook or choose_codebook(weight, config, importance)
    table = book.tensor().to(weight.device)
    grids = search_grids(config.method, book.name, config.group_size)
    codes, scale = ops.ovp_quantize(weight, table, config.group_size, *grids, importance)
    return QuantizedWeight(codes, scale, table)


def quantize_weight8(weight: Tensor, config: QuantConfig, *, name: str = "weight") -> QuantizedWeight8:
    """Quantize one weight to 8 bits; arguments and errors as in `quantize_weight`."""
    weight = checked(weight, name)
    if config.bits != 8:
        raise ValueError(f"config: expected bits=8, got {config.bits}; see quantize_weight")
    grids = search_grids8(config.method)
    codes, scale = ops.ovp8_quantize(weight, config.group_size, grids.pairing, grids.pair)
    return QuantizedWeight8(codes, scale)


def checked(weight: Tensor, name: str) -> Tensor:
    """The weight without its graph; errors as in `quantize_weight`."""
    if weight.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name}: expected shape [N, K] with N, K >= 1, got {tuple(weight.shape)}")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite values, got {weight[tuple(where)].item()} at {where}; "
            f"repair the checkpoint or leave this module out with QuantConfig(skip=...)"
        )
    return weight.detach()
