"""The definition of the operators on quantized activations and on weights of eight bits, in plain PyTorch.

Integer sums are exact, and the float32 operations around them are in a fixed order, one rounding each, so
`ovp_linear_quantized_reference` is what CPU kernels give bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.activations import DYNAMIC_GRIDS, integer_block
from olive.formats.codebooks import Codebook
from olive.formats.layout import PER_TENSOR, expand_scale, groups_per_row, pad_columns
from olive.formats.ovp4 import Pairing, ovp4_decode_levels, ovp4_encode
from olive.formats.ovp8 import encode_pairs8, ovp8_decode, ovp8_decode_levels, ovp8_encode
from olive.formats.scales import TINY, pack_scale, round_scale, unpack_scale
from olive.ops import schemas_quantized as schemas
from olive.ops.reference import group_statistics, group_sum, ovp_quantize_reference, ovp_unpack_reference
from olive.ops.rounding import divided, fused_multiply_add
from olive.ops.schemas import library


def quantize_activations_reference(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: Pairing,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Turn activations into levels and scales: input ~ levels x scale.

    Dynamic scales: "int8" takes max|x| / 127; "ovp4" and "ovp8" try `DYNAMIC_GRIDS` as `ovp_quantize` and
    `ovp8_quantize` do with weights, whose rows tokens are here. Groups below 2^-60 become zeros with scale 1.
    A group with NaN or Inf gets levels 0 and scale NaN; with a static scale, a row.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        format: "int8": round to nearest, ties to even, -127..127; "ovp4" or "ovp8": outlier-victim pairs,
            decoded (a victim is level 0).
        group_size: columns that share a scale; -1 per token, 0 per tensor, with `static_scale`.
        pairing: "optimal" or "paper", see `PairTables.encode_pair_rule`.
        codebook: int8 [32] for "ovp4", else None.
        static_scale: int16 [1], a stored scale, for group_size 0, else None.
        dtype: of the levels: int8, or a float type, all of which hold every level exactly.

    Returns:
        levels `dtype` [..., K], scale float32 [..., G].
    """
    columns = schemas.check_activations(input, format, group_size, pairing, codebook, static_scale)
    schemas.check_levels(format, codebook, dtype)
    x = input.reshape(-1, columns).float()
    groups = groups_per_row(columns, group_size)
    width = columns if group_size <= 0 else group_size
    finite = torch.isfinite(pad_columns(x, width)).unflatten(1, (groups, width)).all(-1)
    clean = torch.where(_per_column(finite, width, columns), x, 0.0)
    if format == "int8":
        levels, scale = _int8(clean, width, static_scale)
    elif format == "ovp4":
        assert codebook is not None
        levels, scale = _ovp4(clean, group_size, pairing, codebook, static_scale)
    else:
        levels, scale = _ovp8(clean, group_size, pairing, static_scale)
    scale = torch.where(finite, scale, torch.nan)
    return levels.to(dtype).reshape(input.shape), scale.reshape(*input.shape[:-1], groups)


def _per_column(values: Tensor, width: int, columns: int) -> Tensor:
    """One value per group to one per column."""
    return values.repeat_interleave(width, dim=1)[:, :columns]


def _int8(x: Tensor, width: int, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if static_scale is None:
        largest = pad_columns(x, width).unflatten(1, (-1, width)).abs().amax(-1)
        scale = torch.where(largest < TINY, 1.0, divided(largest, 127.0))
    else:
        scale = unpack_scale(static_scale)[0].expand(len(x), 1)
    t = x * _per_column(1.0 / scale, width, x.shape[1])
    return torch.clamp(torch.round(t), -127, 127), scale


def _ovp4(
    x: Tensor, group_size: int, pairing: Pairing, codebook: Tensor, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    book = Codebook.from_tensor(codebook)
    rows, columns = x.shape
    if rows == 0:
        return x, x.new_empty(0, groups_per_row(columns, group_size))
    if static_scale is None:
        codes, stored = ovp_quantize_reference(x, codebook, group_size, pairing, *DYNAMIC_GRIDS["ovp4"], None)
    else:
        stored = static_scale[None]
        codes = ovp4_encode(x, stored, book, group_size, pairing)
    value, plain = unpack_scale(stored)
    levels = ovp4_decode_levels(codes, expand_scale(plain, rows, columns, group_size)[:, 0::2], book)
    return levels[:, :columns].float(), value.expand(rows, -1)


def _ovp8(x: Tensor, group_size: int, pairing: Pairing, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    if rows == 0:
        return x, x.new_empty(0, groups_per_row(columns, group_size))
    if static_scale is None:
        codes, stored = ovp8_quantize_reference(x, group_size, pairing, DYNAMIC_GRIDS["ovp8"][0])
    else:
        stored = static_scale[None]
        codes = ovp8_encode(x, stored, group_size, pairing)
    return ovp8_decode_levels(codes)[:, :columns].float(), unpack_scale(stored)[0].expand(rows, -1)


def ovp_linear_quantized_reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    format: str,
    activation_group_size: int,
    pairing: Pairing,
    activation_codebook: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """y = x W^T + bias with x quantized first and integer products: W4A8 ("int8") and W4A4 ("ovp4").

    For every run of columns under one scale of each (`integer_block`), S = sum of level_x x level_w, exact.
    Runs are added first to last in float32, with one fused multiply-add each. One scale per row of x:
    total = fma(S, scale_w, total), and in the end total x scale_x. One per row and group:
    total = fma(S, scale_x x scale_w, total). Then the bias is added, and the result rounded to the input's
    dtype.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        codes, scale, codebook, bias, out_features, group_size: as in `ovp_linear`; levels up to 127.
        format, activation_group_size, pairing, activation_codebook, static_scale: as in
            `quantize_activations`; "int8" or "ovp4".

    Returns:
        input's dtype, [..., N].

    Raises:
        ValueError: a codebook with levels above 127 (`flint4`), or so many columns under one scale that an
            int32 could overflow.
    """
    columns = schemas.check_linear_quantized(
        input,
        codes,
        scale,
        codebook,
        bias,
        out_features,
        group_size,
        format,
        activation_group_size,
        pairing,
        activation_codebook,
        static_scale,
    )
    schemas.check_int8_levels("codebook", codebook)
    if codes.dim() == 3:
        codes, scale = ovp_unpack_reference(codes, scale, out_features, columns, group_size)
    x, scale_x = quantize_activations_reference(
        input, format, activation_group_size, pairing, activation_codebook, static_scale, torch.int8
    )
    x, scale_x = x.reshape(-1, columns).double(), scale_x.reshape(-1, scale_x.shape[-1])
    value, plain = unpack_scale(scale)
    rule = expand_scale(plain, out_features, columns, group_size)[:, 0::2]
    w = ovp4_decode_levels(codes, rule, Codebook.from_tensor(codebook))[:, :columns].double()
    width = integer_block(columns, group_size, activation_group_size)
    total = torch.zeros(len(x), out_features, device=input.device)
    for first in range(0, columns, width):
        sums = x[:, first : first + width] @ w[:, first : first + width].T  # integers below 2^31: exact
        factor = value[:, 0 if group_size <= 0 else first // group_size]
        if activation_group_size > 0:
            factor = scale_x[:, first // activation_group_size, None] * factor
        total = fused_multiply_add(sums.float(), factor, total)
    if activation_group_size <= 0:
        total = total * scale_x
    if bias is not None:
        total = total + bias.float()
    return total.to(input.dtype).reshape(*input.shape[:-1], out_features)


def ovp8_quantize_reference(
    weight: Tensor, group_size: int, pairing: Pairing, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """Search a scale per group for the least squared error, and encode with 8-bit outlier-victim pairs.

    Candidates are min(max|w|, multiple x 3 sigma) / 127, rounded to the stored form; the least error wins,
    the earlier one on a tie. Sums, sigma and zeros are those of `ovp_quantize`.

    Args:
        weight: float [N, K], finite.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: "optimal" or "paper", see `encode_pairs8`.
        grid: multiples, > 0.

    Returns:
        codes uint8 [N, 2 ceil(K / 2)], scale int16 `scale_shape(N, K, group_size)`.

    Source: OliVe, arXiv:2304.07493, section 3.4 (search from 3 sigma); the bound max|w|: ours.
    """
    rows, columns = schemas.check_quantize8(weight, group_size, pairing, grid)
    per_tensor = group_size == PER_TENSOR
    found = group_statistics(weight, group_size)
    best = torch.full_like(found.energy, float("inf"))
    best_scale = torch.ones_like(found.largest)
    for multiple in grid:
        step = torch.tensor(multiple, dtype=torch.float32, device=weight.device)
        scale = round_scale(divided(torch.minimum(found.largest, step * found.three_sigma), 127.0))
        pairs = encode_pairs8(found.values * (1.0 / scale)[:, None], pairing)[1]
        error = group_sum(pairs, per_tensor) * (scale.double() * scale.double())
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    best_scale = torch.where(found.largest < TINY, 1.0, best_scale)
    shape = (1 if per_tensor else rows, groups_per_row(columns, group_size))
    stored = pack_scale(best_scale, torch.zeros_like(best_scale, dtype=torch.bool)).reshape(shape)
    return ovp8_encode(weight, stored, group_size, pairing), stored


def ovp8_decode_reference(
    codes: Tensor, scale: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Decode 8-bit codes to scale x level, exact in float32, then round to `dtype`: [N, K]."""
    schemas.check_decode8(codes, scale, in_features, group_size, dtype)
    return ovp8_decode(codes, scale, in_features, group_size).to(dtype).contiguous()


def ovp8_linear_reference(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """y = x W^T + bias with W of eight bits decoded to float32, float32 products and sums, rounded once.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        codes: uint8 [N, 2 ceil(K / 2)].
        scale: int16, `scale_shape(N, K, group_size)`.
        bias: float [N] or None.
        out_features: N.
        group_size: -1 per channel, 0 per tensor, else columns per group.

    Returns:
        input's dtype, [..., N].
    """
    columns = schemas.check_linear8(input, codes, scale, bias, out_features, group_size)
    weight = ovp8_decode(codes, scale, columns, group_size)
    out = torch.nn.functional.linear(input.float(), weight, None if bias is None else bias.float())
    return out.to(input.dtype)


for _name, _function in (
    ("quantize_activations", quantize_activations_reference),
    ("ovp_linear_quantized", ovp_linear_quantized_reference),
    ("ovp8_quantize", ovp8_quantize_reference),
    ("ovp8_decode", ovp8_decode_reference),
    ("ovp8_linear", ovp8_linear_reference),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")
