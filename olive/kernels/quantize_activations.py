"""Activations to integer levels and float32 scales, bit for bit the reference, without waiting for the GPU.

A span is what shares a scale: a group of columns or, per token and with a static scale, a row. Static scales
come with rows all the same, because a row that is not finite becomes zeros with scale NaN.

"int8" (`quantize_int8_kernel`) reads a span once where it fits registers, else its rest a second time, from
the L2 cache; it is bound by memory. "ovp4" and "ovp8" (`quantize_pairs_kernel`) search a scale as
`ovp_quantize` does, with fewer candidates. The ordered sum of a row is one of chunks of 1024 columns, added
in float64: a program holds all chunks of its spans, and several candidates, side by side as segments of
`olive.kernels.search`, so that a single token keeps a few warps busy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.activations import DYNAMIC_OVP8_GRID, DYNAMIC_PAIR_GRID, DYNAMIC_PLAIN_GRID
from olive.formats.layout import PER_TENSOR, groups_per_row
from olive.formats.ovp4 import Pairing
from olive.kernels.launch import ceil_div, kernel_group_size
from olive.kernels.levels import (
    encode_pair_rule,
    encode_plain_rule,
    has_plain,
    load_codebook,
    load_pair,
    nearest_int8,
    reciprocal,
)
from olive.kernels.levels8 import encode_pairs8
from olive.kernels.pairs import unpack_scale
from olive.kernels.search import (
    CHUNK_STEPS,
    EIGHT_BITS,
    INFINITY_BITS,
    LANES,
    PAIR_RULE,
    PLAIN_RULE,
    STEP_COLUMNS,
    TINY,
    base_scales,
    candidate_scale,
    candidate_scale8,
    magnitude_bits,
    scaled_error,
    segment_error,
    segment_stats,
    three_sigmas,
)

# Grids are compile-time constants: in memory they would have to be copied to the GPU.
SIGNED_PLAIN_GRID = tuple(sign * multiple for multiple in DYNAMIC_PLAIN_GRID for sign in (1.0, -1.0))
CHUNK_COLUMNS = tl.constexpr(1024)

INT8_VALUES = 4096  # of groups per program of 4 warps: 32 for each thread
INT8_BLOCK = 8192  # columns of a row that stay in registers: 32 for each thread of 8 warps
# Spans x chunks x candidates of a program, each 16 lanes of pairs: four per thread of 4 warps. With few spans
# candidates are searched side by side, one pair per thread, so that a step takes less time; with many one
# after another, since the grids' 5 and 6 are no powers of two.
PAIRS_SEGMENTS = 32
MAX_CANDIDATES = 8
MAX_SEGMENTS = 256  # eight pairs per thread of 16 warps; for rows of more than 32768 columns fewer candidates
FEW_SEGMENTS = 2048  # chunks or groups: 256 threads for each of 132 SMs
MAX_WARPS = 16


class PairsPlan(NamedTuple):
    """How `quantize_pairs_kernel` is launched."""

    spans: int  # per program
    chunks: int  # per span, a power of two
    candidates: int  # side by side
    warps: int


def plan_pairs(spans: int, width: int, searched: bool) -> PairsPlan:
    """Blocks for a number of spans of some width, in columns; a static scale is not searched."""
    chunks = triton.next_power_of_2(ceil_div(width, CHUNK_COLUMNS.value))
    few = spans * chunks <= FEW_SEGMENTS
    candidates = max(1, min(MAX_CANDIDATES, MAX_SEGMENTS // chunks)) if few and searched else 1
    block = max(1, PAIRS_SEGMENTS // (chunks * candidates))
    pairs = LANES.value * block * chunks * candidates
    return PairsPlan(block, chunks, candidates, max(1, min(MAX_WARPS, pairs // (32 if few else 128))))


@triton.jit
def span_columns(
    span,  # int32 [S]
    spans,
    columns,  # K
    groups,  # per row
    GROUP_SIZE: tl.constexpr,  # 0 = the whole row
):
    """Where spans are: offset of the row, int64, first column and the first one past them, int32."""
    offset = (span // groups).to(tl.int64) * columns
    start = (span % groups) * GROUP_SIZE
    stop = columns + 0 * start
    if GROUP_SIZE > 0:
        stop = tl.minimum(start + GROUP_SIZE, columns)
    return offset, start, stop, tl.where(span < spans, stop, 0)


@triton.jit(do_not_specialize=["spans"])
def quantize_int8_kernel(
    x_ptr,  # float [M, K]
    static_ptr,  # int16 [1], None = dynamic
    levels_ptr,  # int8 or float [M, K]
    scale_ptr,  # float32 [M, G]
    spans,  # M G
    columns,  # K
    groups,  # G
    GROUP_SIZE: tl.constexpr,  # 0 = the whole row
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns
):
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    offset, start, _, stop = span_columns(span, spans, columns, groups, GROUP_SIZE)
    width = columns if GROUP_SIZE == 0 else GROUP_SIZE
    first = start[:, None] + tl.arange(0, BLOCK)[None, :]
    x_row, levels_row, stop = x_ptr + offset[:, None], levels_ptr + offset[:, None], stop[:, None]

    x = tl.load(x_row + first, mask=first < stop, other=0.0).to(tl.float32)
    bits = tl.max(magnitude_bits(x), 1)
    for k in range(BLOCK, width, BLOCK):
        rest = tl.load(x_row + first + k, mask=first + k < stop, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(magnitude_bits(rest), 1))
    finite = bits < INFINITY_BITS
    if static_ptr is None:
        largest = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
        scale = tl.where(largest < TINY, 1.0, tl.math.div_rn(largest, 127.0))
    else:
        scale = unpack_scale(tl.load(static_ptr))[0] + tl.full([SPANS], 0.0, tl.float32)
    tl.store(scale_ptr + span, tl.where(finite, scale, float("nan")), mask=span < spans)

    factor, finite = reciprocal(scale)[:, None], finite[:, None]
    level = nearest_int8(tl.where(finite, x, 0.0) * factor)
    tl.store(levels_row + first, level.to(levels_ptr.dtype.element_ty), mask=first < stop)
    for k in range(BLOCK, width, BLOCK):
        rest = tl.load(x_row + first + k, mask=first + k < stop, other=0.0).to(tl.float32)
        level = nearest_int8(tl.where(finite, rest, 0.0) * factor)
        tl.store(levels_row + first + k, level.to(levels_ptr.dtype.element_ty), mask=first + k < stop)


@triton.jit
def chunk_sum(
    values,  # float64 [R x CHUNKS]
    chunks,  # that are there
    CHUNKS: tl.constexpr,
):
    """Sums over chunks, first to last: float64 [R]. Each `tl.sum` has one term that is not zero."""
    if CHUNKS == 1:
        return values
    else:  # noqa: RET505  (Triton compiles one branch only if the other is spelled out)
        ROWS: tl.constexpr = values.shape[0] // CHUNKS
        values = tl.reshape(values, [ROWS, CHUNKS])
        chunk = tl.arange(0, CHUNKS)[None, :]
        total = tl.full([ROWS], 0.0, tl.float64)
        for i in range(chunks):
            total += tl.sum(tl.where(chunk == i, values, 0.0), 1)
        return total


@triton.jit
def per_segment(
    values,  # [R], one for each span
    CHUNKS: tl.constexpr,
):
    """Values repeated for the chunks of a span: [R x CHUNKS]."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], [ROWS, CHUNKS]), [ROWS * CHUNKS])


@triton.jit
def repeated(
    values,  # [R]
    COUNT: tl.constexpr,
):
    """Values, all of them COUNT times: [COUNT x R]."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], [COUNT, ROWS]), [COUNT * ROWS])


@triton.jit
def search_grid(
    x_ptr,  # float [M, K]
    offset,  # int64 [SPANS x CHUNKS], as `segment_stats`
    start,
    stop,
    chunks,
    steps,
    base,  # float32 [SPANS], what the grid multiplies; with eight bits, the largest magnitudes
    three_sigma,  # float32 [SPANS], of eight bits
    codebook,  # from `load_codebook`; None with eight bits
    best,  # float64 [SPANS], the least error so far
    best_scale,  # float32 [SPANS]
    best_plain,  # int32 [SPANS]
    GRID: tl.constexpr,
    COUNT: tl.constexpr,  # of the grid
    RULE: tl.constexpr,
    OPTIMAL: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Tries the multiples of a grid, CANDIDATES at a time, in order: least error, its scale and rule bit."""
    SPANS: tl.constexpr = base.shape[0]
    offset, start = repeated(offset, CANDIDATES), repeated(start, CANDIDATES)
    stop = repeated(stop, CANDIDATES)
    for first in range(0, COUNT, CANDIDATES):
        candidate = first + tl.arange(0, CANDIDATES)[:, None]
        multiple = tl.full([CANDIDATES, 1], 1.0, tl.float32)
        for i in tl.static_range(COUNT):
            multiple = tl.where(candidate == i, GRID[i], multiple)
        if RULE == EIGHT_BITS:
            scale = candidate_scale8(base[None, :], three_sigma[None, :], multiple)
        else:
            scale = candidate_scale(base[None, :], multiple)
        flat = per_segment(tl.reshape(scale, [CANDIDATES * SPANS]), CHUNKS)
        error = segment_error(x_ptr, None, offset, start, stop, steps, flat, codebook, RULE, OPTIMAL)
        error = tl.reshape(chunk_sum(error, chunks, CHUNKS), [CANDIDATES, SPANS])
        error = scaled_error(error, scale)
        error = tl.where((candidate < COUNT) & (error < float("inf")), error, float("inf"))  # nor NaN
        least = tl.min(error, 0)
        winner = tl.min(tl.where(error == least[None, :], candidate, COUNT), 0)
        winning = tl.sum(tl.where(candidate == winner[None, :], scale, 0.0), 0)  # one term
        better = least < best
        best = tl.where(better, least, best)
        best_scale = tl.where(better, winning, best_scale)
        best_plain = tl.where(better, RULE == PLAIN_RULE, best_plain)
    return best, best_scale, best_plain


@triton.jit(do_not_specialize=["spans"])
def quantize_pairs_kernel(
    x_ptr,  # float [M, K]
    codebook_ptr,  # int8 [32], None = eight bits
    static_ptr,  # int16 [1], None = dynamic
    levels_ptr,  # int8 or float [M, K]
    scale_ptr,  # float32 [M, G]
    spans,  # M G
    columns,  # K
    groups,  # G
    chunks,  # per span
    steps,  # of 32 columns, that cover a chunk
    GRID: tl.constexpr,  # tuple of multiples
    COUNT: tl.constexpr,
    PLAIN_GRID: tl.constexpr,  # tuple of multiples of both signs, for the plain rule
    PLAIN_COUNT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0 = the whole row
    OPTIMAL: tl.constexpr,
    SPANS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    SEGMENTS: tl.constexpr = SPANS * CHUNKS
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    inside = span < spans
    offset, start, end, stop = span_columns(span, spans, columns, groups, GROUP_SIZE)
    count = end - start
    offset, start, stop = per_segment(offset, CHUNKS), per_segment(start, CHUNKS), per_segment(stop, CHUNKS)
    start += CHUNK_COLUMNS * (tl.arange(0, SEGMENTS) % CHUNKS)
    stop = tl.minimum(start + CHUNK_COLUMNS, stop)

    largest, energy = segment_stats(x_ptr, offset, start, stop, steps)
    bits = tl.max(tl.reshape(magnitude_bits(largest), [SPANS, CHUNKS]), 1)
    finite = bits < INFINITY_BITS
    scale = tl.full([SPANS], 1.0, tl.float32)
    rule = tl.full([SPANS], 0, tl.int32)
    if static_ptr is not None:
        value, plain = unpack_scale(tl.load(static_ptr))
        scale, rule = scale * value, rule + plain
    else:
        largest = bits.to(tl.float32, bitcast=True)
        energy = chunk_sum(energy, chunks, CHUNKS)
        best = tl.full([SPANS], float("inf"), tl.float64)
        if codebook_ptr is None:
            best, scale, rule = search_grid(
                x_ptr,
                offset,
                start,
                stop,
                chunks,
                steps,
                largest,
                three_sigmas(energy, count),
                None,
                best,
                scale,
                rule,
                GRID,
                COUNT,
                EIGHT_BITS,
                OPTIMAL,
                CHUNKS,
                CANDIDATES,
            )
        else:
            codebook = load_codebook(codebook_ptr)
            pair_base, plain_base = base_scales(largest, energy, count, codebook)
            best, scale, rule = search_grid(
                x_ptr,
                offset,
                start,
                stop,
                chunks,
                steps,
                pair_base,
                None,
                codebook,
                best,
                scale,
                rule,
                GRID,
                COUNT,
                PAIR_RULE,
                OPTIMAL,
                CHUNKS,
                CANDIDATES,
            )
            if has_plain(codebook):
                best, scale, rule = search_grid(
                    x_ptr,
                    offset,
                    start,
                    stop,
                    chunks,
                    steps,
                    plain_base,
                    None,
                    codebook,
                    best,
                    scale,
                    rule,
                    PLAIN_GRID,
                    PLAIN_COUNT,
                    PLAIN_RULE,
                    OPTIMAL,
                    CHUNKS,
                    CANDIDATES,
                )
        tiny = ~finite | (largest < TINY)
        scale, rule = tl.where(tiny, 1.0, scale), tl.where(tiny, 0, rule)
    tl.store(scale_ptr + span, tl.where(finite, scale, float("nan")), mask=inside)

    if codebook_ptr is not None:
        codebook = load_codebook(codebook_ptr)  # anew, so that the search need not keep it in registers
    factor = per_segment(reciprocal(scale), CHUNKS)[:, None]
    rule, finite = per_segment(rule, CHUNKS)[:, None], per_segment(finite, CHUNKS)[:, None]
    for step in range(steps):
        column = start[:, None] + step * STEP_COLUMNS + 2 * tl.arange(0, LANES)[None, :]
        even, odd = load_pair(x_ptr, offset[:, None], column, stop[:, None])
        even, odd = tl.where(finite, even, 0.0) * factor, tl.where(finite, odd, 0.0) * factor
        if codebook_ptr is None:
            _, _, _, low, high = encode_pairs8(even, odd, OPTIMAL)
        else:
            _, _, low, high = encode_pair_rule(even, odd, None, None, codebook[0], codebook[1], OPTIMAL)
            if has_plain(codebook):
                _, _, plain_low, plain_high = encode_plain_rule(even, odd, None, None, codebook[2])
                low, high = tl.where(rule != 0, plain_low, low), tl.where(rule != 0, plain_high, high)
        level = tl.reshape(tl.join(low, high), [SEGMENTS, STEP_COLUMNS])
        column = start[:, None] + step * STEP_COLUMNS + tl.arange(0, STEP_COLUMNS)[None, :]
        tl.store(
            levels_ptr + offset[:, None] + column,
            level.to(levels_ptr.dtype.element_ty),
            mask=column < stop[:, None],
        )


def quantize_activations_triton(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: Pairing,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Turn activations into levels and scales: input ~ levels x scale.

    Nothing is read back from the GPU, so it can be captured in a CUDA graph. That also means that nobody
    looks here whether a codebook's levels fit `dtype` (`check_levels`): the caller has to know.

    Args:
        input: float32, bfloat16 or float16 [..., K]; any strides.
        format: "int8", "ovp4" or "ovp8".
        group_size: columns that share a scale; -1 per token, 0 per tensor, with `static_scale`.
        pairing: "optimal" or "paper".
        codebook: int8 [32] for "ovp4", else None.
        static_scale: int16 [1], a stored scale, for group_size 0, else None.
        dtype: of the levels: int8, float32, bfloat16 or float16.

    Returns:
        levels `dtype` [..., K], scale float32 [..., G].
    """
    columns = int(input.shape[-1])
    x = input.reshape(-1, columns).contiguous()
    rows, groups = int(x.shape[0]), groups_per_row(columns, group_size)
    levels = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((rows, groups), dtype=torch.float32)
    spans, group = rows * groups, kernel_group_size(group_size)
    width = group or columns
    static = static_scale if group_size == PER_TENSOR else None
    if spans == 0:
        return levels.view(input.shape), scale.view(*input.shape[:-1], groups)
    with torch.cuda.device_of(x):
        if format == "int8":
            block = group or min(triton.next_power_of_2(columns), INT8_BLOCK)
            per_program = INT8_VALUES // group if group else 1
            quantize_int8_kernel[(ceil_div(spans, per_program),)](
                x,
                static,
                levels,
                scale,
                spans,
                columns,
                groups,
                GROUP_SIZE=group,
                SPANS=per_program,
                BLOCK=block,
                num_warps=4 if block <= INT8_VALUES else 8,
                enable_fp_fusion=False,
            )
        else:
            plan = plan_pairs(spans, width, static is None)
            grid = DYNAMIC_PAIR_GRID if format == "ovp4" else DYNAMIC_OVP8_GRID
            quantize_pairs_kernel[(ceil_div(spans, plan.spans),)](
                x,
                None if codebook is None else codebook.contiguous(),
                static,
                levels,
                scale,
                spans,
                columns,
                groups,
                ceil_div(width, CHUNK_COLUMNS.value),
                min(ceil_div(width, STEP_COLUMNS.value), CHUNK_STEPS.value),
                GRID=grid,
                COUNT=len(grid),
                PLAIN_GRID=SIGNED_PLAIN_GRID,
                PLAIN_COUNT=len(SIGNED_PLAIN_GRID),
                GROUP_SIZE=group,
                OPTIMAL=pairing == "optimal",
                SPANS=plan.spans,
                CHUNKS=plan.chunks,
                CANDIDATES=plan.candidates,
                num_warps=plan.warps,
                enable_fp_fusion=False,
            )
    return levels.view(input.shape), scale.view(*input.shape[:-1], groups)
