"""Search a scale per group for eight bits, then encode: bit for bit the reference.

The search is that of `ovp_quantize` with a short grid; see there and `olive.kernels.search`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.layout import PER_TENSOR, codes_shape, scale_shape
from olive.formats.ovp4 import Pairing
from olive.kernels.launch import ceil_div, kernel_group_size, scale_stride
from olive.kernels.levels import load_pair, reciprocal
from olive.kernels.levels8 import encode_pairs8
from olive.kernels.ovp_quantize import BLOCK_CHANNELS, BLOCK_GROUPS
from olive.kernels.pairs import load_scale, unpack_scale
from olive.kernels.per_tensor import search_per_tensor
from olive.kernels.search import (
    EIGHT_BITS,
    STEP_COLUMNS,
    candidate_scale8,
    pack_scale,
    scaled_error,
    segment_error,
    segment_stats,
    three_sigmas,
)

BLOCK_ROWS = 4
BLOCK_PAIRS = 128


@triton.jit
def ovp8_quantize_kernel(
    weight_ptr,  # float [N, K]
    multiples_ptr,  # float32 [C]
    scale_ptr,  # int16 [N, G]
    segments,  # N G
    columns,  # K
    groups,  # G, per row
    candidates,  # C
    row_steps,  # of 32 columns in a row, rounded up
    GROUP_SIZE: tl.constexpr,  # 0 = the whole row
    OPTIMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = segment < segments
    offset = (segment // groups).to(tl.int64) * columns
    start = (segment % groups) * GROUP_SIZE
    stop = columns + 0 * start
    steps = row_steps
    if GROUP_SIZE > 0:
        stop = tl.minimum(start + GROUP_SIZE, columns)
        steps = GROUP_SIZE // STEP_COLUMNS
    count = stop - start
    stop = tl.where(inside, stop, 0)

    largest, energy = segment_stats(weight_ptr, offset, start, stop, steps)
    three_sigma = three_sigmas(energy, count)
    best = tl.full([BLOCK], float("inf"), tl.float64)
    best_scale = tl.full([BLOCK], 1.0, tl.float32)
    for i in range(candidates):
        scale = candidate_scale8(largest, three_sigma, tl.load(multiples_ptr + i))
        error = segment_error(weight_ptr, None, offset, start, stop, steps, scale, None, EIGHT_BITS, OPTIMAL)
        error = scaled_error(error, scale)
        best_scale = tl.where(error < best, scale, best_scale)
        best = tl.where(error < best, error, best)
    tl.store(scale_ptr + segment, pack_scale(best_scale, 0, largest), mask=inside)


@triton.jit
def ovp8_encode_kernel(
    weight_ptr,  # float [N, K]
    scale_ptr,  # int16 [N or 1, G]
    pairs_ptr,  # int16 [N, P], two bytes of codes each
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

    value, _ = unpack_scale(load_scale(scale_ptr, row, 2 * pair, rows, columns, scale_stride, GROUP_SIZE))
    factor = reciprocal(value)
    low, high, _, _, _ = encode_pairs8(even * factor, odd * factor, OPTIMAL)
    word = (low | (high << 8)).to(tl.int16)
    tl.store(pairs_ptr + row.to(tl.int64) * pairs + pair, word, mask=inside)


def _search(weight: Tensor, group_size: int, pairing: Pairing, multiples: Tensor) -> Tensor:
    """The best scale of every group of columns or of every row: int16 `scale_shape`."""
    rows, columns = weight.shape
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device=weight.device)
    block = BLOCK_GROUPS if group_size > 0 else BLOCK_CHANNELS
    with torch.cuda.device_of(weight):
        ovp8_quantize_kernel[(ceil_div(scale.numel(), block),)](
            weight,
            multiples,
            scale,
            scale.numel(),
            columns,
            int(scale.shape[1]),
            multiples.numel(),
            ceil_div(columns, STEP_COLUMNS.value),
            GROUP_SIZE=kernel_group_size(group_size),
            OPTIMAL=pairing == "optimal",
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return scale


def _encode(weight: Tensor, scale: Tensor, group_size: int, pairing: Pairing) -> Tensor:
    rows, columns = weight.shape
    codes = torch.empty(codes_shape(rows, columns, bits=8), dtype=torch.uint8, device=weight.device)
    pairs = codes.view(torch.int16)
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        ovp8_encode_kernel[(ceil_div(rows, BLOCK_ROWS), ceil_div(int(pairs.shape[1]), BLOCK_PAIRS))](
            weight,
            scale,
            pairs,
            flag,
            rows,
            columns,
            int(pairs.shape[1]),
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


def ovp8_quantize_triton(
    weight: Tensor, group_size: int, pairing: Pairing, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """Search a scale per group for the least squared error, and encode with 8-bit outlier-victim pairs.

    Waits for the kernels, which note non-finite weights on their way.

    Args:
        weight: float32, bfloat16 or float16 [N, K]; any strides.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: "optimal" or "paper".
        grid: multiples of 3 sigma, > 0.

    Returns:
        codes uint8 [N, 2 ceil(K / 2)], scale int16 `scale_shape(N, K, group_size)`.

    Raises:
        ValueError: weight holds NaN or Inf.
    """
    weight = weight.contiguous()
    multiples = torch.tensor(grid, dtype=torch.float32, device=weight.device)
    if group_size == PER_TENSOR:
        scale = search_per_tensor(weight, None, group_size, pairing, multiples, len(grid), None)
    else:
        scale = _search(weight, group_size, pairing, multiples)
    return _encode(weight, scale, group_size, pairing), scale
