"""Decode a packed weight: weight[n, k] = scale x level, exact in float32, rounded once to the asked type.

One program decodes a block of rows by pairs; every thread reads bytes and writes both columns of each. Bound
by memory: a weight costs 2 bytes of writing beside a dozen instructions, so nothing is gained by a table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.kernels.launch import ceil_div, kernel_group_size, scale_stride
from olive.kernels.pairs import level, load_scale, unpack_scale

BLOCK_ROWS = 4
BLOCK_PAIRS = 256  # 1 KiB of float16 per row: whole cache lines


@triton.jit
def ovp_decode_kernel(
    codes_ptr,  # uint8 [N, P]
    scale_ptr,  # int16 [N or 1, G]
    codebook_ptr,  # int8 [32]
    out_ptr,  # float [N, K], or int8: levels, which have to fit it
    rows,  # N
    columns,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows, 0 per tensor
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    pair = tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = (row < rows) & (pair < pairs)
    codes = tl.load(codes_ptr + row.to(tl.int64) * pairs + pair, mask=inside, other=0).to(tl.int32)
    stored = load_scale(scale_ptr, row, 2 * pair, rows, columns, scale_stride, GROUP_SIZE)
    value, plain = unpack_scale(stored)
    low, high = codes & 15, codes >> 4
    even, odd = level(codebook_ptr, low, high, plain), level(codebook_ptr, high, low, plain)
    if not out_ptr.dtype.element_ty.is_int8():
        even, odd = even * value, odd * value
    weight = tl.reshape(tl.join(even, odd), [BLOCK_ROWS, 2 * BLOCK_PAIRS])
    column = tl.program_id(1) * 2 * BLOCK_PAIRS + tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    tl.store(
        out_ptr + row.to(tl.int64) * columns + column,
        weight.to(out_ptr.dtype.element_ty),
        mask=(row < rows) & (column < columns),
    )


def ovp_decode_triton(
    codes: Tensor, scale: Tensor, codebook: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Decode to scale x level, exact in float32, then round to `dtype`, to nearest even.

    Args:
        codes: uint8 [N, ceil(K / 2)].
        scale: int16 bit patterns, `scale_shape(N, K, group_size)`.
        codebook: int8 [32].
        in_features: K; the pad column of an odd K is dropped.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        dtype: float32, bfloat16 or float16; or int8 for the bare levels, which have to fit it.

    Returns:
        dtype [N, K].
    """
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, pairs = codes.shape
    out = torch.empty((rows, in_features), dtype=dtype, device=codes.device)
    grid = (ceil_div(rows, BLOCK_ROWS), ceil_div(pairs, BLOCK_PAIRS))
    with torch.cuda.device_of(codes):
        ovp_decode_kernel[grid](
            codes,
            scale,
            codebook.contiguous(),
            out,
            rows,
            in_features,
            pairs,
            scale_stride(scale, group_size),
            GROUP_SIZE=kernel_group_size(group_size),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_PAIRS=BLOCK_PAIRS,
            enable_fp_fusion=False,
        )
    return out
