"""The definition of every operator in plain PyTorch, registered for every device.

Kernels are tested against these functions: encode, decode and scale search bit for bit, `ovp_linear` against
float64. Sums that decide between scales are taken in a fixed order (`ordered_sum`), so that every backend
decides alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olive.formats.codebooks import Codebook
from olive.formats.layout import PER_TENSOR, groups_per_row, pad_columns
from olive.formats.ovp4 import Pairing, PairTables, ovp4_decode, ovp4_encode
from olive.formats.scales import TINY, pack_scale, round_scale
from olive.ops import schemas
from olive.ops.packed import PackedLayout, packed_layout
from olive.ops.rounding import divided
from olive.ops.schemas import library

LANES = 16
CHUNK = 1024  # columns summed in float32 before the sum goes on in float64


def ordered_sum(pairs: Tensor) -> Tensor:
    """Sum one value per pair in the order that every backend follows.

    Pairs go to 16 lanes in turn, each lane adds in float32, the lanes are folded 8, 4, 2, 1; chunks of 1024
    columns (512 pairs) are then added in float64, first to last.

    Args:
        pairs: float32 [..., P]; P any, missing pairs count as zero.

    Returns:
        float64 [...].
    """
    pairs = pad_columns(pairs, LANES)
    total = torch.zeros(pairs.shape[:-1], dtype=torch.float64, device=pairs.device)
    for chunk in pairs.split(CHUNK // 2, dim=-1):
        steps = chunk.unflatten(-1, (-1, LANES))
        lanes = steps[..., 0, :]
        for step in range(1, steps.shape[-2]):
            lanes = lanes + steps[..., step, :]
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        total = total + lanes[..., 0].double()
    return total


def group_sum(pairs: Tensor, per_tensor: bool) -> Tensor:
    """One sum per group of [groups, P]; for a per-tensor scale, rows are added in float64, first to last."""
    sums = ordered_sum(pairs)
    return sums.cumsum(0)[-1:] if per_tensor else sums


class GroupStatistics(NamedTuple):
    """What a scale search starts from, one entry per group."""

    values: Tensor  # float32 [rows x groups, width], padded with zeros
    largest: Tensor  # float32 [groups]: max|w|
    three_sigma: Tensor  # float32 [groups]: three times the root mean square
    energy: Tensor  # float64 [groups]: sum of squares


def group_statistics(weight: Tensor, group_size: int) -> GroupStatistics:
    """A weight [N, K] as groups, with their largest magnitudes and root mean squares.

    Raises:
        ValueError: NaN or Inf in it.
    """
    rows, columns = weight.shape
    per_tensor = group_size == PER_TENSOR
    groups = groups_per_row(columns, group_size)
    width = columns + columns % 2 if group_size <= 0 else group_size
    values = pad_columns(weight.float(), width).reshape(-1, width)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    largest = values.abs().amax() if per_tensor else values.abs().amax(dim=1)
    squares = values * values
    energy = group_sum(squares[:, 0::2] + squares[:, 1::2], per_tensor)
    counts = torch.full((groups,), width, dtype=torch.float64, device=weight.device)
    counts[-1] = columns - (groups - 1) * width if group_size > 0 else columns
    counts = counts * rows if per_tensor else counts.repeat(rows)
    three_sigma = (3.0 * torch.sqrt(energy / counts)).float()
    return GroupStatistics(values, largest.reshape(-1), three_sigma, energy)


def ovp_quantize_reference(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: Pairing,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Search a scale and a rule per group for the least squared error, and encode.

    Candidates, in this order: the pair rule with scale = min(max|w|, 3 sigma) / normal[7] times each multiple
    of `pair_grid`; then, if the codebook has plain levels, the plain rule with scale = max|w| / plain[15]
    times each multiple of `plain_grid`, positive and then negative. Each candidate is rounded to its stored
    form before it is tried. The least error wins, the earlier one on a tie. sigma is the root mean square of
    the group. Groups below 2^-60 become zeros with scale 1.

    Args:
        weight: float [N, K], finite.
        codebook: int8 [32].
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: "optimal" or "paper", see `PairTables.encode_pair_rule`.
        pair_grid: multiples, > 0; empty = the pair rule is not tried.
        plain_grid: multiples, > 0; empty = the plain rule is not tried.
        importance: float32 [K], from 0 to 2^64, weighs the squared error of each column; None = all alike.

    Returns:
        codes uint8 [N, ceil(K / 2)], scale int16 `scale_shape(N, K, group_size)`.

    Source: OliVe, arXiv:2304.07493, section 3.4 (search from 3 sigma); grids, plain rule, negative scales:
        ours.
    """
    rows, columns = schemas.check_quantize(
        weight, codebook, group_size, pairing, pair_grid, plain_grid, importance
    )
    book = Codebook.from_tensor(codebook)
    schemas.check_values(codebook, pair_grid, importance)
    per_tensor = group_size == PER_TENSOR
    groups = groups_per_row(columns, group_size)
    values, largest, three_sigma, energy = group_statistics(weight, group_size)
    weights = None
    if importance is not None:
        width = values.shape[1]
        weights = pad_columns(importance[None], width).reshape(-1, width).repeat(rows, 1)
    pair_base = divided(torch.minimum(largest, three_sigma), float(book.normal[7]))
    plain_base = divided(largest, float(max(book.plain[15], 1)))

    tables = PairTables(book, weight.device)
    best = torch.full_like(energy, float("inf"))
    best_scale = torch.ones_like(pair_base)
    best_plain = torch.zeros_like(best, dtype=torch.bool)

    def attempt(base: Tensor, multiple: float, plain: bool) -> None:
        nonlocal best, best_scale, best_plain
        scale = round_scale(base * torch.tensor(multiple, dtype=torch.float32, device=weight.device))
        t = values * (1.0 / scale)[:, None]
        if plain:
            pairs = tables.encode_plain(t, weights)[1]
        else:
            pairs = tables.encode_pair_rule(t, pairing, weights)[1]
        error = group_sum(pairs, per_tensor) * (scale.double() * scale.double())
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_plain = torch.where(better, plain, best_plain)

    for multiple in pair_grid:
        attempt(pair_base, multiple, plain=False)
    if book.has_plain:
        for multiple in plain_grid:
            attempt(plain_base, multiple, plain=True)
            attempt(plain_base, -multiple, plain=True)
    zero = largest < TINY
    best_scale = torch.where(zero, 1.0, best_scale)
    best_plain = best_plain & ~zero
    scale = pack_scale(best_scale, best_plain).reshape(1 if per_tensor else rows, groups)
    return ovp4_encode(weight, scale, book, group_size, pairing, importance), scale


def ovp_encode_reference(
    weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: Pairing
) -> Tensor:
    """Encode with scales given: `olive.formats.ovp4_encode` as an operator."""
    schemas.check_encode(weight, scale, codebook, group_size, pairing)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return ovp4_encode(weight, scale, Codebook.from_tensor(codebook), group_size, pairing)


def ovp_decode_reference(
    codes: Tensor, scale: Tensor, codebook: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Decode to scale x level, exact in float32, then round to `dtype`: [N, K]."""
    schemas.check_decode(codes, scale, codebook, in_features, group_size, dtype)
    weight = ovp4_decode(codes, scale, Codebook.from_tensor(codebook), in_features, group_size)
    return weight.to(dtype).contiguous()  # an odd K leaves a view without the pad column


def ovp_pack_reference(
    codes: Tensor, scale: Tensor, in_features: int, group_size: int, layout: PackedLayout | None = None
) -> tuple[Tensor, Tensor]:
    """Bring codes and scale into a packed layout (`olive.ops.packed`), by default that of their device."""
    schemas.check_canonical(codes)
    schemas.check_stored(codes, scale, None, int(codes.shape[0]), in_features, group_size)
    return (layout or packed_layout(codes.device)).pack(codes, scale, in_features, group_size)


def ovp_unpack_reference(
    codes: Tensor,
    scale: Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `ovp_pack`: canonical codes and scale."""
    layout = layout or packed_layout(codes.device)
    schemas.check_packed(codes, layout)
    schemas.check_stored(codes, scale, None, out_features, in_features, group_size, layout)
    return layout.unpack(codes, scale, out_features, in_features, group_size)


def ovp_linear_reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """y = x W^T + bias with W decoded to float32, float32 products and sums, rounded once to x's dtype.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        codes: uint8 [N, ceil(K / 2)], or the backend's packed layout.
        scale: int16, likewise.
        codebook: int8 [32].
        bias: float [N] or None.
        out_features: N.
        group_size: -1 per channel, 0 per tensor, else columns per group.

    Returns:
        input's dtype, [..., N].
    """
    schemas.check_linear(input, codes, scale, codebook, bias, out_features, group_size)
    columns = int(input.shape[-1])
    if codes.dim() == 3:
        codes, scale = ovp_unpack_reference(codes, scale, out_features, columns, group_size)
    weight = ovp4_decode(codes, scale, Codebook.from_tensor(codebook), columns, group_size)
    out = torch.nn.functional.linear(input.float(), weight, None if bias is None else bias.float())
    return out.to(input.dtype)


for _name, _function in (
    ("ovp_quantize", ovp_quantize_reference),
    ("ovp_encode", ovp_encode_reference),
    ("ovp_decode", ovp_decode_reference),
    ("ovp_pack", ovp_pack_reference),
    ("ovp_unpack", ovp_unpack_reference),
    ("ovp_linear", ovp_linear_reference),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")
