"""From a float weight to codes, scales and a codebook: what is searched for which configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.config import QuantConfig
from olive.formats.codebooks import LEARNED, Codebook, get_codebook
from olive.ops.schemas import FLOATS
from olive.ptq.grids import PAIR_GRID, PAPER_GRID, PLAIN_GRID, WIDE_PAIR_GRID
from olive.ptq.learned import fit_codebook


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in the stored form of `olive.formats`."""

    codes: Tensor  # uint8 [N, ceil(K / 2)]
    scale: Tensor  # int16 [N, G]
    codebook: Tensor  # int8 [32]


def quantize_weight(
    weight: Tensor, config: QuantConfig, *, importance: Tensor | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Quantize one weight as the configuration says, on the device it is on.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        config: codebook, group size and method.
        importance: float32 [K], from 0 to 2^64, weighs the squared error of each column; None = all alike.
        name: what to call the weight in errors.

    Raises:
        ValueError: not two-dimensional, empty, or not finite.
        TypeError: not a float type.
    """
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
    weight = weight.detach()
    if config.codebook == LEARNED:
        book: Codebook = fit_codebook(weight, config.group_size, importance)
    else:
        book = get_codebook(config.codebook)
    table = book.tensor().to(weight.device)
    wide = config.codebook == "flint4" or config.group_size <= 0
    pairing, pair_grid, plain_grid = "optimal", WIDE_PAIR_GRID if wide else PAIR_GRID, PLAIN_GRID
    if config.method == "paper":
        pairing, pair_grid, plain_grid = "paper", PAPER_GRID, ()
    codes, scale = ops.ovp_quantize(
        weight, table, config.group_size, pairing, list(pair_grid), list(plain_grid), importance
    )
    return QuantizedWeight(codes, scale, table)
