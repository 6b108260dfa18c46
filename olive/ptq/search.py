"""From a float weight to codes, scales and a codebook: what is searched for which configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.config import PAPER_CODEBOOKS, QuantConfig
from olive.formats import PAPER, Pairing
from olive.formats.codebooks import LEARNED, Codebook, get_codebook
from olive.ops.schemas import FLOATS
from olive.ptq.grids import OVP8_GRID, PAIR_GRID, PAPER_GRID, PLAIN_GRID, WIDE_PAIR_GRID
from olive.ptq.learned import fit_codebook
from olive.ptq.noise import energies


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in the stored form of `olive.formats`, 4 bits."""

    codes: Tensor  # uint8 [N, ceil(K / 2)]
    scale: Tensor  # int16 [N, G]
    codebook: Tensor  # int8 [32]


class QuantizedWeight8(NamedTuple):
    """The same in 8 bits."""

    codes: Tensor  # uint8 [N, 2 ceil(K / 2)]
    scale: Tensor  # int16 [N, G]


class Grids(NamedTuple):
    """Which pairs are made, and multiples of the base scales to try."""

    pairing: Pairing
    pair: list[float]
    plain: list[float]


def search_grids(method: str, codebook: str, group_size: int) -> Grids:
    """What `ovp_quantize` is to search for a method, a codebook's name and a group size."""
    if method == "paper":
        return Grids("paper", list(PAPER_GRID), [])
    wide = codebook == "flint4" or group_size <= 0
    return Grids("optimal", list(WIDE_PAIR_GRID if wide else PAIR_GRID), list(PLAIN_GRID))


def search_grids8(method: str) -> Grids:
    """The same for `ovp8_quantize`."""
    return (
        Grids("paper", list(PAPER_GRID), []) if method == "paper" else Grids("optimal", list(OVP8_GRID), [])
    )


def quantize_weight(
    weight: Tensor, config: QuantConfig, *, importance: Tensor | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Quantize one weight to 4 bits as the configuration says, on the device it is on.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        config: codebook, group size and method.
        importance: float32 [K], from 0 to 2^64, weighs the squared error of each column; None = all alike.
            Codebook "paper" takes none.
        name: what to call the weight in errors.

    Raises:
        ValueError: not two-dimensional, empty, or not finite; a configuration of 8 bits.
        TypeError: not a float type.
    """
    weight = _checked(weight, name)
    if config.bits != 4:
        raise ValueError(f"config: expected bits=4, got {config.bits}; see quantize_weight8")
    if config.codebook != PAPER:
        return _search(weight, config, importance)
    if importance is not None:
        raise ValueError("importance: expected None with codebook 'paper', got a tensor")
    both = [_search(weight, replace(config, codebook=one), None) for one in PAPER_CODEBOOKS]
    noise = [energies(weight, one.codes, one.scale, one.codebook, config.group_size)[1] for one in both]
    return both[1] if noise[1] < noise[0] else both[0]


def quantize_weight8(weight: Tensor, config: QuantConfig, *, name: str = "weight") -> QuantizedWeight8:
    """Quantize one weight to 8 bits; arguments and errors as in `quantize_weight`."""
    weight = _checked(weight, name)
    if config.bits != 8:
        raise ValueError(f"config: expected bits=8, got {config.bits}; see quantize_weight")
    grids = search_grids8(config.method)
    codes, scale = ops.ovp8_quantize(weight, config.group_size, grids.pairing, grids.pair)
    return QuantizedWeight8(codes, scale)


def _checked(weight: Tensor, name: str) -> Tensor:
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


def _search(weight: Tensor, config: QuantConfig, importance: Tensor | None) -> QuantizedWeight:
    """4 bits with one codebook."""
    if config.codebook == LEARNED:
        book: Codebook = fit_codebook(weight, config.group_size, importance)
    else:
        book = get_codebook(config.codebook)
    table = book.tensor().to(weight.device)
    grids = search_grids(config.method, config.codebook, config.group_size)
    codes, scale = ops.ovp_quantize(weight, table, config.group_size, *grids, importance)
    return QuantizedWeight(codes, scale, table)
