"""y = x W^T + bias with both sides integers: int8 levels, int32 sums on the matrix units, float32 scales.

x [M, K] is quantized first, by `quantize_activations_triton`. W is in 4-bit outlier-victim pairs, decoded to
int8 in registers; its rows are the left operand, so that few activation rows waste little of a product.

Sums of the columns that share a scale on both sides (`integer_block`) are exact in int32. The float32
operations around them are the reference's, in its order: one fused multiply-add for each such sum, then a
row's scale, the bias, and rounding to x's type. So the outputs are the reference's bits, except where
programs share the columns of a tile and groups have scales: then their float32 sums are added afterwards, in
a fixed order. (With one scale per row they share an int32 sum, which has no order.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.activations import integer_block
from olive.formats.ovp4 import Pairing
from olive.kernels.launch import capability_of, ceil_div, kernel_group_size, scale_stride
from olive.kernels.ovp_decode import ovp_decode_triton
from olive.kernels.ovp_linear import PROGRAMS, SUM_BLOCK, Plan, split_columns
from olive.kernels.pairs import decode_pairs, load_scale, pair_table, unpack_scale
from olive.kernels.quantize_activations import quantize_activations_triton

# From here on the weight is decoded to a buffer of int8 first, for 2.5 bytes of traffic per weight. A look-up
# in shared memory for every two weights, with its bank conflicts, takes longer than the product of a tile's
# 128 rows, so decoding once per tile costs more than half of the speed.
DECODE_FROM_ROWS = 256
WIDE_CAPABILITY = 90  # from here on 256 x 128 sums and what feeds them fit the registers


class QuantizedPlan(NamedTuple):
    """How the product is launched."""

    tile: Plan
    decoded: bool  # whether the weight is decoded to memory first


def plan_linear_quantized(
    rows: int,
    out_features: int,
    in_features: int,
    group_size: int,
    activation_group_size: int,
    capability: int,
) -> QuantizedPlan:
    """Blocks and splits for a product, from its shape and the GPU, which decides on no sum's order."""
    decoded = rows >= DECODE_FROM_ROWS
    few_rows = rows <= 16
    small = rows <= 64 or ceil_div(rows, 128) * ceil_div(out_features, 128) < PROGRAMS // 2
    grouped = max(group_size, activation_group_size) > 0
    if few_rows:
        # 64 bytes of codes per row and step, two sectors; 8 KiB a step, 3 steps ahead, for each of the 2 or 3
        # programs of an SM, are more than the 15 KiB in flight that an H100's memory needs of each SM.
        block_m, block_n, block_k, warps, stages = 16, 128, 128, 4, 4
    elif small:
        block_m, block_n, block_k, warps, stages = (32 if rows <= 32 else 64), 64, 128, 4, 3
    elif activation_group_size > 0 or (grouped and not decoded):
        # An int32 and a float32 sum for each of 128 x 128 outputs, with scales of both sides or with decoding
        # beside them, would overflow the registers.
        block_m, block_n, block_k, warps, stages = 64, 128, 128, 8, 3
    elif not grouped and decoded and capability >= WIDE_CAPABILITY:
        # One sum for each output: 128 registers per thread. 96 KiB of shared memory of the least 99;
        # 48 bytes per clock and SM from the L2 cache at full speed, where 128 x 128 takes 64.
        block_m, block_n, block_k, warps, stages = 256, 128, 64, 8, 4
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 128, 8, 3
    if grouped:
        block_k = min(block_k, integer_block(in_features, group_size, activation_group_size))
    tiles = ceil_div(rows, block_m) * ceil_div(out_features, block_n)
    splits = split_columns(rows, tiles, ceil_div(in_features, block_k))
    return QuantizedPlan(Plan(block_m, block_n, block_k, splits, warps, stages), decoded)


@triton.jit(do_not_specialize=["rows"])
def ovp_linear_quantized_kernel(
    x_ptr,  # int8 [M, K], levels
    x_scale_ptr,  # float32 [M, XG]
    codes_ptr,  # uint8 [N, P], or int8 [N, K]: levels
    scale_ptr,  # int16 [N or 1, G]
    codebook_ptr,  # int8 [32], levels within -127..127
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # float [M, N], or sums [splits, M, N], int32 or float32, that the next kernel adds
    rows,  # M
    out_features,  # N
    in_features,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows of the weight, 0 per tensor
    x_groups,  # XG
    blocks_per_split,
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row of the weight
    X_GROUP_SIZE: tl.constexpr,  # 0 = one scale per row of x
    SPLIT: tl.constexpr,  # whether sums are stored
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of x vary fastest, so that programs that run together decode the same codes from the L2 cache.
    DECODED: tl.constexpr = codes_ptr.dtype.element_ty.is_int8()
    WHOLE: tl.constexpr = GROUP_SIZE == 0 and X_GROUP_SIZE == 0
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(2) * blocks_per_split * BLOCK_K
    stop = tl.minimum(start + blocks_per_split * BLOCK_K, in_features)
    x_row = x_ptr + m.to(tl.int64)[None, :] * in_features
    x_scale_row = x_scale_ptr + m.to(tl.int64) * x_groups
    codes_row = codes_ptr + n.to(tl.int64)[:, None] * (in_features if DECODED else pairs)

    stored = load_scale(scale_ptr, n, start, out_features, in_features, scale_stride, GROUP_SIZE)
    if not DECODED:
        table = pair_table(codebook_ptr, tl.int8)
    acc = tl.full([BLOCK_N, BLOCK_M], 0, tl.int32 if WHOLE else tl.float32)
    for k in range(start, stop, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        x_inside = (m < rows)[None, :] & (column < in_features)[:, None]
        x = tl.load(x_row + column[:, None], mask=x_inside, other=0)
        value, plain = unpack_scale(stored)
        if DECODED:
            inside = (n < out_features)[:, None] & (column < in_features)[None, :]
            weight = tl.load(codes_row + column[None, :], mask=inside, other=0)
        else:
            pair = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            codes = tl.load(codes_row + pair, mask=(n < out_features)[:, None] & (pair < pairs), other=0)
            weight = decode_pairs(table, codes, plain[:, None], tl.int8)
        if WHOLE:
            acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        else:
            if GROUP_SIZE > 0:
                # A step early: two bytes a row are too few for the pipeline of asynchronous copies.
                stored = load_scale(
                    scale_ptr, n, k + BLOCK_K, out_features, in_features, scale_stride, GROUP_SIZE
                )
            factor = value[:, None]
            if X_GROUP_SIZE > 0:
                x_scale = tl.load(x_scale_row + k // X_GROUP_SIZE, mask=m < rows, other=0.0)
                factor = x_scale[None, :] * factor
            sums = tl.dot(weight, x, out_dtype=tl.int32).to(tl.float32)
            acc = tl.fma(sums, tl.broadcast_to(factor, [BLOCK_N, BLOCK_M]), acc)

    outside = (n < out_features)[:, None] & (m < rows)[None, :]
    split_row = tl.program_id(2).to(tl.int64) * rows + m
    target = out_ptr + split_row[None, :] * out_features + n[:, None]
    if SPLIT:
        tl.store(target, acc, mask=outside)
    else:
        if WHOLE:
            value = tl.broadcast_to(unpack_scale(stored)[0][:, None], [BLOCK_N, BLOCK_M])
            acc = tl.fma(acc.to(tl.float32), value, tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32))
        if X_GROUP_SIZE == 0:
            acc *= tl.load(x_scale_row, mask=m < rows, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=outside)


@triton.jit
def ovp_linear_quantized_sum_kernel(
    partial_ptr,  # int32 [splits, M, N] with one scale per row on both sides, else float32
    x_scale_ptr,  # float32 [M], None = already applied
    scale_ptr,  # int16 [N or 1, 1], for int32 sums
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # float [M, N]
    size,  # M N
    out_features,  # N
    scale_stride,
    splits,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    n = index % out_features
    total = tl.full([BLOCK], 0, partial_ptr.dtype.element_ty)
    offset = index
    for _ in range(splits):
        total += tl.load(partial_ptr + offset, mask=inside, other=0)
        offset += size
    if partial_ptr.dtype.element_ty.is_int32():
        value, _ = unpack_scale(tl.load(scale_ptr + n * scale_stride, mask=inside, other=0))
        total = tl.fma(total.to(tl.float32), value, tl.full([BLOCK], 0.0, tl.float32))
    if x_scale_ptr is not None:
        total *= tl.load(x_scale_ptr + index // out_features, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=inside)


def _product(
    x: Tensor,  # int8 [M, K]
    x_scale: Tensor,  # float32 [M, XG]
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out: Tensor,  # float [M, N]
    group_size: int,
    activation_group_size: int,
) -> None:
    rows, columns = x.shape
    out_features = int(out.shape[1])
    size = (rows, out_features, columns)
    tile, decoded = plan_linear_quantized(*size, group_size, activation_group_size, capability_of(x.device))
    if decoded:
        codes = ovp_decode_triton(codes, scale, codebook, columns, group_size, torch.int8)
    stride, group = scale_stride(scale, group_size), kernel_group_size(group_size)
    x_group = kernel_group_size(activation_group_size)
    whole = tile.splits == 1
    target = out
    if not whole:
        kind = torch.float32 if group or x_group else torch.int32
        target = out.new_empty((tile.splits, rows, out_features), dtype=kind)
    grid = (ceil_div(rows, tile.block_m), ceil_div(out_features, tile.block_n), tile.splits)
    ovp_linear_quantized_kernel[grid](
        x,
        x_scale,
        codes,
        scale,
        codebook,
        bias,
        target,
        rows,
        out_features,
        columns,
        ceil_div(columns, 2),
        stride,
        int(x_scale.shape[1]),
        tile.blocks_per_split(columns),
        GROUP_SIZE=group,
        X_GROUP_SIZE=x_group,
        SPLIT=not whole,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if not whole:
        ovp_linear_quantized_sum_kernel[(ceil_div(out.numel(), SUM_BLOCK),)](
            target,
            None if x_group else x_scale,
            scale,
            bias,
            out,
            out.numel(),
            out_features,
            stride,
            tile.splits,
            BLOCK=SUM_BLOCK,
            enable_fp_fusion=False,
        )


def ovp_linear_quantized_triton(
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

    Nothing is read back from the GPU and nothing is tuned at run time, so it can be captured in a CUDA graph.
    That also means that nobody looks at the codebooks' values here: levels above 127 (`flint4`) would be cut
    off without a word. Who calls this has made sure that there are none, as the modules do when they are
    made (`check_int8_levels`).

    Args:
        input: float32, bfloat16 or float16 [..., K]; any strides.
        codes: uint8 [N, ceil(K / 2)], the canonical layout.
        scale: int16, `scale_shape(N, K, group_size)`.
        codebook: int8 [32], levels up to 127.
        bias: float [N] or None.
        out_features: N.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        format, activation_group_size, pairing, activation_codebook, static_scale: as in
            `quantize_activations`; "int8" or "ovp4".

    Returns:
        input's dtype, [..., N].
    """
    columns = int(input.shape[-1])
    levels, x_scale = quantize_activations_triton(
        input, format, activation_group_size, pairing, activation_codebook, static_scale, torch.int8
    )
    levels, x_scale = levels.view(-1, columns), x_scale.view(-1, x_scale.shape[-1])
    out = input.new_empty((levels.shape[0], out_features))
    if out.numel() > 0:
        with torch.cuda.device_of(input):
            _product(
                levels,
                x_scale,
                codes.contiguous(),
                scale.contiguous(),
                codebook.contiguous(),
                None if bias is None else bias.contiguous(),
                out,
                group_size,
                activation_group_size,
            )
    return out.view(*input.shape[:-1], out_features)
