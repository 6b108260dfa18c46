"""The search for one scale of a whole weight: group size 0 of `ovp_quantize_triton`, `ovp8_quantize_triton`.

The error of a candidate is a sum over rows, first to last, in float64. Programs write one error per row and
candidate, float64 [N, C]; `rows_sum_kernel` adds down the columns in order, a candidate per lane. (Torch's
cumsum on a GPU adds in another order.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.ovp4 import Pairing
from olive.kernels.launch import ceil_div
from olive.kernels.levels import has_plain, load_codebook
from olive.kernels.search import (
    EIGHT_BITS,
    PAIR_RULE,
    PLAIN_RULE,
    STEP_COLUMNS,
    base_scales,
    candidate_scale,
    candidate_scale8,
    pack_scale,
    scaled_error,
    segment_error,
    segment_stats,
    three_sigmas,
)

BLOCK_ROWS = 8  # of 16 lanes: one pair per thread of 4 warps
BLOCK_COLUMNS = 32
ROWS_IN_FLIGHT = 8  # loads ahead of the additions, which wait for one another


@triton.jit
def row_stats_kernel(
    weight_ptr,  # float [N, K]
    largest_ptr,  # float32 [N]
    energy_ptr,  # float64 [N]
    rows,
    columns,
    steps,  # of 32 columns, rounded up
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stop = tl.where(row < rows, columns, 0)
    largest, energy = segment_stats(weight_ptr, row.to(tl.int64) * columns, 0 * row, stop, steps)
    tl.store(largest_ptr + row, largest, mask=row < rows)
    tl.store(energy_ptr + row, energy, mask=row < rows)


@triton.jit
def rows_sum_kernel(
    values_ptr,  # float64 [N, C]
    sums_ptr,  # float64 [C]
    rows,
    columns,  # C
    BLOCK: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    offset = column.to(tl.int64)
    for _ in tl.range(0, rows, 1, num_stages=IN_FLIGHT):
        total += tl.load(values_ptr + offset, mask=column < columns, other=0.0)
        offset += columns
    tl.store(sums_ptr + column, total, mask=column < columns)


@triton.jit(do_not_specialize=["count"])
def candidate_scales_kernel(
    codebook_ptr,  # int8 [32], None = eight bits
    multiples_ptr,  # float32 [C], those of the pair rule first
    largest_ptr,  # float32 [1], of the whole weight
    energy_ptr,  # float64 [1]
    scales_ptr,  # float32 [C]
    count,  # values in the weight
    candidates,  # C
    pair_count,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest, energy = tl.load(largest_ptr), tl.load(energy_ptr)
    multiple = tl.load(multiples_ptr + index, mask=index < candidates, other=1.0)
    if codebook_ptr is None:
        scale = candidate_scale8(largest, three_sigmas(energy, count), multiple)
    else:
        pair_base, plain_base = base_scales(largest, energy, count, load_codebook(codebook_ptr))
        scale = candidate_scale(tl.where(index < pair_count, pair_base, plain_base), multiple)
    tl.store(scales_ptr + index, scale, mask=index < candidates)


@triton.jit
def row_errors_kernel(
    weight_ptr,  # float [N, K]
    codebook_ptr,  # int8 [32], None = eight bits
    importance_ptr,  # float32 [K], None = all alike
    scales_ptr,  # float32 [C], those of the pair rule first
    errors_ptr,  # float64 [N, C], in squared units of the scale
    rows,
    columns,
    candidates,  # C
    pair_count,
    steps,  # of 32 columns, rounded up
    OPTIMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    candidate = tl.program_id(1)
    offset, start = row.to(tl.int64) * columns, 0 * row
    stop = tl.where(row < rows, columns, 0)
    scale = tl.load(scales_ptr + candidate + start)
    error = tl.full([BLOCK], 0.0, tl.float64)
    if codebook_ptr is None:
        error = segment_error(weight_ptr, None, offset, start, stop, steps, scale, None, EIGHT_BITS, OPTIMAL)
    else:
        codebook = load_codebook(codebook_ptr)
        if candidate < pair_count:
            error = segment_error(
                weight_ptr, importance_ptr, offset, start, stop, steps, scale, codebook, PAIR_RULE, OPTIMAL
            )
        else:
            error = segment_error(
                weight_ptr, importance_ptr, offset, start, stop, steps, scale, codebook, PLAIN_RULE, OPTIMAL
            )
    tl.store(errors_ptr + row.to(tl.int64) * candidates + candidate, error, mask=row < rows)


@triton.jit
def best_scale_kernel(
    codebook_ptr,  # int8 [32], None = eight bits
    largest_ptr,  # float32 [1]
    scales_ptr,  # float32 [C], those of the pair rule first
    errors_ptr,  # float64 [C]
    scale_ptr,  # int16 [1, 1]
    candidates,  # C
    pair_count,
):
    allowed = pair_count  # candidates that the codebook has levels for
    if codebook_ptr is not None:
        allowed = tl.where(has_plain(load_codebook(codebook_ptr)), candidates, pair_count)
    best = tl.full([], float("inf"), tl.float64)
    best_scale = tl.full([], 1.0, tl.float32)
    best_plain = tl.full([], 0, tl.int32)
    for i in range(allowed):
        scale = tl.load(scales_ptr + i)
        error = scaled_error(tl.load(errors_ptr + i), scale)
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, scale, best_scale)
        best_plain = tl.where(better, tl.where(i >= pair_count, 1, 0), best_plain)
    tl.store(scale_ptr, pack_scale(best_scale, best_plain, tl.load(largest_ptr)))


def _rows_sum(values: Tensor) -> Tensor:
    """Float64 [N, C] to [C], first row to last."""
    rows, columns = values.shape
    sums = values.new_empty(columns)
    rows_sum_kernel[(ceil_div(columns, BLOCK_COLUMNS),)](
        values,
        sums,
        rows,
        columns,
        BLOCK=BLOCK_COLUMNS,
        IN_FLIGHT=ROWS_IN_FLIGHT,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return sums


def search_per_tensor(
    weight: Tensor,  # float [N, K], contiguous
    codebook: Tensor | None,  # None = eight bits
    group_size: int,  # 0
    pairing: Pairing,
    multiples: Tensor,  # float32 [C], those of the pair rule first
    pair_count: int,
    importance: Tensor | None,
) -> Tensor:
    """The best scale and rule of a whole weight: int16 [1, 1]. Holds 8 N C bytes meanwhile."""
    rows, columns = weight.shape
    candidates = multiples.numel()
    row_blocks = ceil_div(rows, BLOCK_ROWS)
    steps = ceil_div(columns, STEP_COLUMNS.value)
    largest = torch.empty(rows, dtype=torch.float32, device=weight.device)
    energy = torch.empty((rows, 1), dtype=torch.float64, device=weight.device)
    scales = torch.empty_like(multiples)
    errors = energy.new_empty((rows, candidates))
    scale = torch.empty((1, 1), dtype=torch.int16, device=weight.device)
    with torch.cuda.device_of(weight):
        row_stats_kernel[(row_blocks,)](
            weight,
            largest,
            energy,
            rows,
            columns,
            steps,
            BLOCK=BLOCK_ROWS,
            enable_fp_fusion=False,
        )
        largest = largest.amax()
        candidate_scales_kernel[(ceil_div(candidates, BLOCK_COLUMNS),)](
            codebook,
            multiples,
            largest,
            _rows_sum(energy),
            scales,
            rows * columns,
            candidates,
            pair_count,
            BLOCK=BLOCK_COLUMNS,
            enable_fp_fusion=False,
        )
        row_errors_kernel[(row_blocks, candidates)](
            weight,
            codebook,
            importance,
            scales,
            errors,
            rows,
            columns,
            candidates,
            pair_count,
            steps,
            OPTIMAL=pairing == "optimal",
            BLOCK=BLOCK_ROWS,
            enable_fp_fusion=False,
        )
        best_scale_kernel[(1,)](
            codebook,
            largest,
            scales,
            _rows_sum(errors),
            scale,
            candidates,
            pair_count,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return scale
