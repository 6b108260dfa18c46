"""y = x W^T + bias with W in outlier-victim pairs of 4 bits, or 8: 16-bit activations, float32 sums.

Layout: x [M, K], codes uint8 [N, ceil(K / 2)], scales int16 [N or 1, G], y [M, N]; of eight bits
(`olive.kernels.ovp8_linear`) codes are a 16-bit word per pair, and there is no codebook. Levels are exact in
the activations' type, and scales are applied to float32 sums over blocks of columns that lie within one
group, so a decoded weight is never rounded. The pad column of an odd K, and columns past K in a block, decode
to something; x is 0 there.

Three kernels: one row is a product with vectors (`ovp_linear_vector_kernel`), more rows use the matrix units
(`ovp_linear_kernel`), and where its blocks are too few to fill a GPU, the columns are split over programs
whose partial sums `ovp_linear_sum_kernel` adds in order. Everything is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.kernels.launch import ceil_div, kernel_group_size, scale_stride
from olive.kernels.levels8 import decode_pairs8, level_table8
from olive.kernels.pairs import decode_pairs, load_scale, pair_table, unpack_scale

# One row: 8 rows of the weight by 1024 columns are 32 bytes of codes per thread and step, and make 512
# programs of a 4096 x 4096 weight, 4 for each of an H100's 132 SMs.
VECTOR_BLOCK_N = 8
VECTOR_BLOCK_K = 1024
VECTOR_WARPS = 4

# Programs that fill a GPU: about two for each of the 108 to 148 SMs of an A100, H100 or B200. Fixed, not
# asked of the device, so that the order of sums does not depend on the size of the GPU.
PROGRAMS = 256
MAX_SPLITS = 8
MIN_SPLIT_BLOCKS = 4  # blocks of columns per split, the least that a pipeline of loads pays off for
SPLIT_ROWS = 64  # with more rows the partial sums outweigh the codes: 4 M N bytes each against N K / 2

SUM_BLOCK = 512


class Plan(NamedTuple):
    """How `ovp_linear_kernel` is launched."""

    block_m: int
    block_n: int
    block_k: int  # at most the group, so that a block has one scale per row of the weight
    splits: int
    warps: int
    stages: int  # loads in flight

    def blocks_per_split(self, in_features: int) -> int:
        """Blocks of columns that one program sums over."""
        return ceil_div(ceil_div(in_features, self.block_k), self.splits)


def split_columns(rows: int, tiles: int, blocks: int) -> int:
    """Programs that share the blocks of columns of each of a product's tiles, none of them without one."""
    if rows > SPLIT_ROWS:
        return 1
    splits = max(1, min(PROGRAMS // tiles, MAX_SPLITS, blocks // MIN_SPLIT_BLOCKS))
    return ceil_div(blocks, ceil_div(blocks, splits))


def plan_linear(rows: int, out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> Plan:
    """Blocks and splits for a product, from its shape alone."""
    few_rows = rows <= 16
    small = rows <= 64 or ceil_div(rows, 128) * ceil_div(out_features, 128) < PROGRAMS // 2
    if dtype == torch.float32:
        # No matrix unit: operands lie in registers, which larger blocks would overflow.
        block_m, block_n, block_k, warps, stages = (16 if few_rows else 32), 64, 32, 4, 2
    elif few_rows:
        # The weight is the left operand, so that few rows waste little: 64 x 16 is a shape of Hopper's units.
        block_m, block_n, block_k, warps, stages = 16, 64, 128, 4, 4
    elif small:
        block_m, block_n, block_k, warps, stages = (32 if rows <= 32 else 64), 64, 128, 4, 3
    else:
        # A block of the weight is decoded once for 128 rows. At most 72 KiB of shared memory of the 99 that
        # the smallest have (sm_86, sm_120); 128 columns instead of 64 would spill there.
        block_m, block_n, block_k, warps, stages = 128, 128, 64, 8, 3
    if group_size > 0:
        block_k = min(block_k, group_size)
    tiles = ceil_div(rows, block_m) * ceil_div(out_features, block_n)
    splits = split_columns(rows, tiles, ceil_div(in_features, block_k))
    return Plan(block_m, block_n, block_k, splits, warps, stages)


@triton.jit(do_not_specialize=["rows"])
def ovp_linear_kernel(
    x_ptr,  # float [M, K]
    codes_ptr,  # uint8 [N, P]; int16 [N, P] of eight bits
    scale_ptr,  # int16 [N or 1, G]
    codebook_ptr,  # int8 [32], None = eight bits
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # x's type [M, N], or float32 [splits, M, N] when the columns are split
    rows,  # M
    out_features,  # N
    in_features,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows of the weight, 0 per tensor
    blocks_per_split,
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row of the weight
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of x vary fastest, so that programs that run together decode the same codes from the L2 cache.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(2) * blocks_per_split * BLOCK_K
    stop = tl.minimum(start + blocks_per_split * BLOCK_K, in_features)
    x_row = x_ptr + m.to(tl.int64)[None, :] * in_features
    codes_row = codes_ptr + n.to(tl.int64)[:, None] * pairs

    stored = load_scale(scale_ptr, n, start, out_features, in_features, scale_stride, GROUP_SIZE)
    table = level_table8(DTYPE) if codebook_ptr is None else pair_table(codebook_ptr, DTYPE)
    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for k in range(start, stop, BLOCK_K):
        pair = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        column = k + tl.arange(0, BLOCK_K)[:, None]
        codes = tl.load(codes_row + pair, mask=(n < out_features)[:, None] & (pair < pairs), other=0)
        x = tl.load(x_row + column, mask=(m < rows)[None, :] & (column < in_features), other=0.0)
        value, plain = unpack_scale(stored)
        if codebook_ptr is None:
            weight = decode_pairs8(table, codes)
        else:
            weight = decode_pairs(table, codes, plain[:, None], DTYPE)
        if GROUP_SIZE == 0:
            acc = tl.dot(weight, x, acc, input_precision="ieee")
        else:
            # A step early: two bytes a row are too few for the pipeline of asynchronous copies.
            stored = load_scale(
                scale_ptr, n, k + BLOCK_K, out_features, in_features, scale_stride, GROUP_SIZE
            )
            acc += tl.dot(weight, x, input_precision="ieee") * value[:, None]
    if GROUP_SIZE == 0:
        acc *= unpack_scale(stored)[0][:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    split_row = tl.program_id(2).to(tl.int64) * rows + m
    tl.store(
        out_ptr + split_row[None, :] * out_features + n[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=(m < rows)[None, :] & (n < out_features)[:, None],
    )


@triton.jit
def ovp_linear_sum_kernel(
    partial_ptr,  # float32 [splits, M, N]
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # float [M, N]
    size,  # M N
    out_features,  # N
    splits,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    offset = index
    for _ in range(splits):
        total += tl.load(partial_ptr + offset, mask=index < size, other=0.0)
        offset += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + index % out_features, mask=index < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def ovp_linear_vector_kernel(
    x_ptr,  # float [K]
    codes_ptr,  # uint8 [N, P]; int16 [N, P] of eight bits
    scale_ptr,  # int16 [N or 1, G]
    codebook_ptr,  # int8 [32], None = eight bits
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # x's type [N]
    out_features,  # N
    in_features,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows of the weight, 0 per tensor
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row of the weight
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Without matrix units a weight costs one multiply-add, and need not change hands between threads.
    GROUP: tl.constexpr = BLOCK_K if GROUP_SIZE == 0 else GROUP_SIZE
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    codes_row = codes_ptr + n.to(tl.int64) * pairs
    table = level_table8(tl.float32) if codebook_ptr is None else pair_table(codebook_ptr, tl.float32)
    acc = tl.full([BLOCK_N, GROUPS], 0.0, tl.float32)
    for k in range(0, in_features, BLOCK_K):
        pair = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        column = k + tl.arange(0, BLOCK_K)
        codes = tl.load(codes_row + pair, mask=(n < out_features) & (pair < pairs), other=0)
        x = tl.load(x_ptr + column, mask=column < in_features, other=0.0).to(tl.float32)
        first = k + GROUP * tl.arange(0, GROUPS)[None, :]
        stored = load_scale(scale_ptr, n, first, out_features, in_features, scale_stride, GROUP_SIZE)
        value, plain = unpack_scale(stored)
        if codebook_ptr is None:
            weight = decode_pairs8(table, codes)
        else:
            rule = tl.broadcast_to(plain[:, :, None], [BLOCK_N, GROUPS, GROUP // 2])
            weight = decode_pairs(table, codes, tl.reshape(rule, [BLOCK_N, BLOCK_K // 2]), tl.float32)
        product = weight * x[None, :]
        acc += tl.sum(tl.reshape(product, [BLOCK_N, GROUPS, GROUP]), 2) * value
    total = tl.reshape(tl.sum(acc, 1), [BLOCK_N, 1])
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < out_features)


def linear(
    input: Tensor,
    codes: Tensor,  # uint8, or int16 of eight bits
    scale: Tensor,
    codebook: Tensor | None,  # None = eight bits
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """`ovp_linear_triton`, and `ovp8_linear_triton` without a codebook."""
    columns = int(input.shape[-1])
    x = input.reshape(-1, columns).contiguous()
    codes, scale = codes.contiguous(), scale.contiguous()
    codebook = None if codebook is None else codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, pairs = int(x.shape[0]), int(codes.shape[1])
    out = x.new_empty((rows, out_features))
    stride, group = scale_stride(scale, group_size), kernel_group_size(group_size)
    with torch.cuda.device_of(x):
        if rows == 1:
            ovp_linear_vector_kernel[(ceil_div(out_features, VECTOR_BLOCK_N),)](
                x,
                codes,
                scale,
                codebook,
                bias,
                out,
                out_features,
                columns,
                pairs,
                stride,
                GROUP_SIZE=group,
                BLOCK_N=VECTOR_BLOCK_N,
                BLOCK_K=VECTOR_BLOCK_K,
                num_warps=VECTOR_WARPS,
                enable_fp_fusion=True,
            )
        elif rows > 1:
            plan = plan_linear(rows, out_features, columns, group_size, x.dtype)
            whole = plan.splits == 1
            target = out if whole else x.new_empty((plan.splits, rows, out_features), dtype=torch.float32)
            grid = (ceil_div(rows, plan.block_m), ceil_div(out_features, plan.block_n), plan.splits)
            ovp_linear_kernel[grid](
                x,
                codes,
                scale,
                codebook,
                bias if whole else None,
                target,
                rows,
                out_features,
                columns,
                pairs,
                stride,
                plan.blocks_per_split(columns),
                GROUP_SIZE=group,
                BLOCK_M=plan.block_m,
                BLOCK_N=plan.block_n,
                BLOCK_K=plan.block_k,
                num_warps=plan.warps,
                num_stages=plan.stages,
                enable_fp_fusion=True,
            )
            if not whole:
                ovp_linear_sum_kernel[(ceil_div(out.numel(), SUM_BLOCK),)](
                    target,
                    bias,
                    out,
                    out.numel(),
                    out_features,
                    plan.splits,
                    BLOCK=SUM_BLOCK,
                    enable_fp_fusion=True,
                )
    return out.view(*input.shape[:-1], out_features)


def ovp_linear_triton(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """y = x W^T + bias with float32 sums, rounded once to x's type.

    No synchronisation and no tuning at run time, so it can be captured in a CUDA graph.

    Args:
        input: float32, bfloat16 or float16 [..., K]; any strides.
        codes: uint8 [N, ceil(K / 2)], the canonical layout.
        scale: int16, `scale_shape(N, K, group_size)`.
        codebook: int8 [32].
        bias: float [N] or None.
        out_features: N.
        group_size: -1 per channel, 0 per tensor, else columns per group.

    Returns:
        input's dtype, [..., N].
    """
    return linear(input, codes, scale, codebook, bias, out_features, group_size)
