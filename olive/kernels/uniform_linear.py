"""y = x W^T + bias with W of integer codes on a uniform grid; x floats, or levels that are int8.

Layout: x [M, K], codes uint8 [N, ceil(K w / 8)], scales float32 [N, G], y [M, N]. With floats a weight is the
integer 2 c - z, exact in every type, and scales / 2 are applied to float32 sums. With levels q it is the int8
d = c - 2^(b - 1): sums of q d are exact, and a level of the weight is d, or d + 1/2 on a mid-rise grid, so
that twice the sum is 2 sum(q d), and sum(q) with mid-rise. Levels of 8 bits without sign come as q - 128;
then 128 sum(d) is added. The output has the bits of the definition where the weight has one scale per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.uniform import doubled_zero, storage_bits
from olive.kernels.launch import ceil_div

LEAST_GROUP = 32  # columns of a block of products, at least; group sizes are multiples of it
MOST_COLUMNS = 64  # codes unpack to a register each: 128 columns would spill


@triton.jit(do_not_specialize=["rows"])
def uniform_linear_kernel(
    x_ptr,  # float [M, K], or int8 [M, K] levels
    codes_ptr,  # uint8 [N, BYTES]
    scale_ptr,  # float32 [N, G]
    x_scale_ptr,  # float32 [M], None with floats
    bias_ptr,  # float [N], None = no bias
    out_ptr,  # float [M, N]
    rows,  # M
    out_features,  # N
    in_features,  # K
    row_bytes,  # BYTES
    groups,  # G
    WIDTH: tl.constexpr,  # bits of storage per code
    BITS: tl.constexpr,
    ZERO: tl.constexpr,  # z
    SHIFTED: tl.constexpr,  # whether levels are q - 128
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row of the weight
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of x vary fastest, so that programs that run together read the same codes from the L2 cache.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    LEVELS: tl.constexpr = x_scale_ptr is not None
    MID_RISE: tl.constexpr = ZERO % 2 == 1
    WHOLE: tl.constexpr = LEVELS and GROUP_SIZE == 0
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[None, :] * in_features
    codes_row = codes_ptr + n.to(tl.int64)[:, None] * row_bytes
    scale_row = scale_ptr + n.to(tl.int64) * groups

    acc = tl.full([BLOCK_N, BLOCK_M], 0, tl.int32 if WHOLE else tl.float32)
    for k in range(0, in_features, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        inside = (n < out_features)[:, None] & (column < in_features)[None, :]
        byte = tl.load(codes_row + (column * WIDTH // 8)[None, :], mask=inside, other=0).to(tl.int32)
        code = (byte >> (column * WIDTH % 8)[None, :]) & ((1 << WIDTH) - 1)
        x_inside = (m < rows)[None, :] & (column < in_features)[:, None]
        x = tl.load(x_row + column[:, None], mask=x_inside, other=0)
        if LEVELS:
            level = tl.where(inside, code - (1 << (BITS - 1)), 0)
            sums = 2 * tl.dot(level.to(tl.int8), x, out_dtype=tl.int32)
            if SHIFTED:
                sums += 256 * tl.sum(level, 1)[:, None]
            if MID_RISE:
                q = x.to(tl.int32)
                if SHIFTED:
                    q += 128 * x_inside.to(tl.int32)
                sums += tl.sum(q, 0)[None, :]
        else:
            weight = (2 * code - ZERO).to(tl.float32).to(DTYPE)
            sums = tl.dot(weight, x, input_precision="ieee")
            sums += tl.sum(x.to(tl.float32) - x.to(tl.float32), 0)[None, :]  # an infinity spoils its row too
        if GROUP_SIZE == 0:
            acc += sums
        else:
            value = tl.load(scale_row + k // GROUP_SIZE, mask=n < out_features, other=0.0)
            acc += sums.to(tl.float32) * value[:, None]

    out = acc.to(tl.float32) * 0.5
    if GROUP_SIZE == 0:
        out *= tl.load(scale_row, mask=n < out_features, other=0.0)[:, None]
    if LEVELS:
        out *= tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + m.to(tl.int64)[None, :] * out_features + n[:, None],
        out.to(out_ptr.dtype.element_ty),
        mask=(m < rows)[None, :] & (n < out_features)[:, None],
    )


def block_columns(in_features: int, group_size: int) -> int:
    """Columns of a block: 64 or 32, whichever divides a group; 0 = neither does."""
    if group_size <= 0 or group_size >= in_features:
        return MOST_COLUMNS
    sizes = (size for size in (MOST_COLUMNS, LEAST_GROUP) if group_size % size == 0)
    return next(sizes, 0)


def uniform_linear_triton(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    mid_rise: bool,
    group_size: int,
    input_scale: Tensor | None,
    shifted: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply; no synchronisation and no tuning at run time, so it can be captured in a CUDA graph.

    Args:
        input: float32, bfloat16 or float16 [M, K]; with an input_scale int8 levels.
        codes: uint8 [N, ceil(K w / 8)].
        scale: float32 [N, G].
        bias: float [N] or None.
        bits, mid_rise: the grid.
        group_size: -1 per channel, else columns per group, for which `block_columns` is not 0.
        input_scale: float32 [M] of levels, else None.
        shifted: whether levels are q - 128.
        dtype: of the output.

    Returns:
        dtype, [M, N].
    """
    rows, columns = (int(size) for size in input.shape)
    out_features = int(codes.shape[0])
    out = torch.empty((rows, out_features), dtype=dtype, device=input.device)
    if out.numel() == 0:
        return out
    input, codes, scale = input.contiguous(), codes.contiguous(), scale.contiguous()
    # Sums of levels or groups beside the products, and float32 without matrix units, spill with 64 rows.
    whole = scale.shape[1] == 1 and input.dtype in (torch.bfloat16, torch.float16)
    block_m, block_n = (16 if rows <= 16 else 64 if whole else 32), 64
    with torch.cuda.device_of(input):
        uniform_linear_kernel[(ceil_div(rows, block_m), ceil_div(out_features, block_n))](
            input,
            codes,
            scale,
            None if input_scale is None else input_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            out_features,
            columns,
            int(codes.shape[1]),
            int(scale.shape[1]),
            WIDTH=storage_bits(bits),
            BITS=bits,
            ZERO=doubled_zero(bits, mid_rise),
            SHIFTED=shifted,
            GROUP_SIZE=0 if scale.shape[1] == 1 else group_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_columns(columns, group_size) if input.dtype != torch.float32 else LEAST_GROUP,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=input_scale is None,
        )
    return out
