"""Encode a weight with scales given, byte for byte as the reference does.

One program encodes a block of rows by pairs, under both rules where the codebook has both, and keeps the one
that the group's rule bit names: about a hundred instructions per weight, near the time its bytes take anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.ovp4 import Pairing
from olive.kernels.launch import ceil_div, kernel_group_size, scale_stride
from olive.kernels.levels import (
    encode_pair_rule,
    encode_plain_rule,
    has_plain,
    load_codebook,
    load_pair,
    reciprocal,
)
from olive.kernels.pairs import load_scale, unpack_scale

BLOCK_ROWS = 4
BLOCK_PAIRS = 128  # with 4 warps four pairs per thread, which leaves registers for the 32 levels


@triton.jit
def ovp_encode_kernel(
    weight_ptr,  # float [N, K]
    scale_ptr,  # int16 [N or 1, G]
    codebook_ptr,  # int8 [32]
    importance_ptr,  # float32 [K], None = all alike
    codes_ptr,  # uint8 [N, P]
    flag_ptr,  # int32 [1], set to 1 if a weight is not finite
    rows,  # N
    columns,  # K
    pairs,  # P = ceil(K / 2)
    scale_stride,  # scales between rows, 0 per tensor
    GROUP_SIZE: tl.constexpr,  # 0 = one scale per row
    OPTIMAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    pair = tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = (row < rows) & (pair < pairs)
    stop = tl.where(row < rows, columns, 0)
    even, odd = load_pair(weight_ptr, row.to(tl.int64) * columns, 2 * pair, stop)
    finite = (tl.abs(even) < float("inf")) & (tl.abs(odd) < float("inf"))
    tl.store(flag_ptr + 0 * pair + 0 * row, 1, mask=~finite)  # every writer writes the same

    stored = load_scale(scale_ptr, row, 2 * pair, rows, columns, scale_stride, GROUP_SIZE)
    value, rule = unpack_scale(stored)
    factor = reciprocal(value)
    even, odd = even * factor, odd * factor
    even_importance, odd_importance = None, None
    if importance_ptr is not None:
        even_importance, odd_importance = load_pair(importance_ptr, 0, 2 * pair, columns)
    codebook = load_codebook(codebook_ptr)
    normal, outlier, plain = codebook
    codes, _, _, _ = encode_pair_rule(even, odd, even_importance, odd_importance, normal, outlier, OPTIMAL)
    if has_plain(codebook):
        plain_codes, _, _, _ = encode_plain_rule(even, odd, even_importance, odd_importance, plain)
        codes = tl.where(rule != 0, plain_codes, codes)
    tl.store(codes_ptr + row.to(tl.int64) * pairs + pair, codes.to(tl.uint8), mask=inside)


def encode(
    weight: Tensor,
    scale: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: Pairing,
    importance: Tensor | None,
) -> Tensor:
    """As `ovp_encode_triton`, with importance, float32 [K] or None, in the choice between pairs."""
    weight, scale = weight.contiguous(), scale.contiguous()
    rows, columns = weight.shape
    pairs = ceil_div(columns, 2)
    codes = torch.empty((rows, pairs), dtype=torch.uint8, device=weight.device)
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        ovp_encode_kernel[(ceil_div(rows, BLOCK_ROWS), ceil_div(pairs, BLOCK_PAIRS))](
            weight,
            scale,
            codebook.contiguous(),
            None if importance is None else importance.contiguous(),
            codes,
            flag,
            rows,
            columns,
            pairs,
            scale_stride(scale, group_size),
            GROUP_SIZE=kernel_group_size(group_size),
            OPTIMAL=pairing == "optimal",
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_PAIRS=BLOCK_PAIRS,
            enable_fp_fusion=False,
        )
    if bool(flag):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return codes


def ovp_encode_triton(
    weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: Pairing
) -> Tensor:
    """Encode with scales given.

    Waits for the kernel, which notes non-finite weights on its way.

    Args:
        weight: float32, bfloat16 or float16 [N, K]; any strides.
        scale: int16 bit patterns with rule bits, `scale_shape(N, K, group_size)`.
        codebook: int8 [32], valid.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: "optimal" or "paper", see `olive.formats.ovp4`.

    Returns:
        uint8 [N, ceil(K / 2)].

    Raises:
        ValueError: weight holds NaN or Inf.
    """
    return encode(weight, scale, codebook, group_size, pairing, None)
