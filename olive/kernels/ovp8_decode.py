"""Decode a weight of eight bits: weight[n, k] = scale x level, exact in float32, rounded once.

One program decodes a block of rows by pairs; a pair is one 16-bit word. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.kernels.launch import ceil_div, kernel_group_size, pairs_of, scale_stride
from olive.kernels.levels8 import level8, split_pairs8
from olive.kernels.pairs import load_scale, unpack_scale

BLOCK_ROWS = 4
BLOCK_PAIRS = 256  # 512 bytes of codes per row


@triton.jit
def ovp8_decode_kernel(
    pairs_ptr,  # int16 [N, P], two bytes of codes each
    scale_ptr,  # int16 [N or 1, G]
    out_ptr,  # float [N, K]
    rows,  # N
    columns,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows, 0 per tensor
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    first = tl.program_id(1) * BLOCK_PAIRS
    pair = first + tl.arange(0, BLOCK_PAIRS)[None, :]
    column = 2 * first + tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    inside = (row < rows) & (pair < pairs)
    codes = tl.load(pairs_ptr + row.to(tl.int64) * pairs + pair, mask=inside, other=0)
    stored = load_scale(scale_ptr, row, column, rows, columns, scale_stride, GROUP_SIZE)
    value, _ = unpack_scale(stored)
    low, high = split_pairs8(codes)
    level = tl.reshape(tl.join(level8(low, high), level8(high, low)), [BLOCK_ROWS, 2 * BLOCK_PAIRS])
    weight = level * value
    tl.store(
        out_ptr + row.to(tl.int64) * columns + column,
        weight.to(out_ptr.dtype.element_ty),
        mask=(row < rows) & (column < columns),
    )


def ovp8_decode_triton(
    codes: Tensor, scale: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Decode to scale x level, exact in float32, then round to `dtype`, to nearest even.

    Args:
        codes: uint8 [N, 2 ceil(K / 2)].
        scale: int16 bit patterns, `scale_shape(N, K, group_size)`.
        in_features: K; the pad column of an odd K is dropped.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        dtype: float32, bfloat16 or float16.

    Returns:
        dtype [N, K].
    """
    pairs, scale = pairs_of(codes), scale.contiguous()
    rows = int(pairs.shape[0])
    out = torch.empty((rows, in_features), dtype=dtype, device=codes.device)
    grid = (ceil_div(rows, BLOCK_ROWS), ceil_div(int(pairs.shape[1]), BLOCK_PAIRS))
    with torch.cuda.device_of(codes):
        ovp8_decode_kernel[grid](
            pairs,
            scale,
            out,
            rows,
            in_features,
            int(pairs.shape[1]),
            scale_stride(scale, group_size),
            GROUP_SIZE=kernel_group_size(group_size),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_PAIRS=BLOCK_PAIRS,
            enable_fp_fusion=False,
        )
    return out
