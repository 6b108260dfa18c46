"""Search a scale and a rule per group for the least squared error, then encode: bit for bit the reference.

Groups and rows are searched by `ovp_quantize_kernel`, which tries all candidates on the values of its groups.
A scale for the whole weight is another matter (`olive.kernels.per_tensor`). Encoding is a pass of its own
over the weight, next to nothing beside a hundred candidates at about 45 instructions a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.layout import PER_TENSOR, scale_shape
from olive.formats.ovp4 import Pairing
from olive.kernels.launch import ceil_div, kernel_group_size
from olive.kernels.levels import has_plain, load_codebook
from olive.kernels.ovp_encode import encode
from olive.kernels.per_tensor import search_per_tensor
from olive.kernels.search import (
    PAIR_RULE,
    PLAIN_RULE,
    STEP_COLUMNS,
    base_scales,
    candidate_scale,
    pack_scale,
    scaled_error,
    segment_error,
    segment_stats,
)

# With 4 warps: four pairs per thread, to hide latencies, of the many groups; one of the few, long rows.
BLOCK_GROUPS = 32
BLOCK_CHANNELS = 8


@triton.jit
def ovp_quantize_kernel(
    weight_ptr,  # float [N, K]
    codebook_ptr,  # int8 [32]
    importance_ptr,  # float32 [K], None = all alike
    multiples_ptr,  # float32 [pair_count + plain_count], the latter of both signs
    scale_ptr,  # int16 [N, G]
    segments,  # N G
    columns,  # K
    groups,  # G, per row
    pair_count,
    plain_count,
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

    codebook = load_codebook(codebook_ptr)
    largest, energy = segment_stats(weight_ptr, offset, start, stop, steps)
    pair_base, plain_base = base_scales(largest, energy, count, codebook)
    best = tl.full([BLOCK], float("inf"), tl.float64)
    best_scale = tl.full([BLOCK], 1.0, tl.float32)
    best_plain = tl.full([BLOCK], 0, tl.int32)
    for i in range(pair_count):
        scale = candidate_scale(pair_base, tl.load(multiples_ptr + i))
        error = segment_error(
            weight_ptr, importance_ptr, offset, start, stop, steps, scale, codebook, PAIR_RULE, OPTIMAL
        )
        error = scaled_error(error, scale)
        best_scale = tl.where(error < best, scale, best_scale)
        best = tl.where(error < best, error, best)
    if has_plain(codebook):
        for i in range(plain_count):
            scale = candidate_scale(plain_base, tl.load(multiples_ptr + pair_count + i))
            error = segment_error(
                weight_ptr, importance_ptr, offset, start, stop, steps, scale, codebook, PLAIN_RULE, OPTIMAL
            )
            error = scaled_error(error, scale)
            best_scale = tl.where(error < best, scale, best_scale)
            best_plain = tl.where(error < best, 1, best_plain)
            best = tl.where(error < best, error, best)
    tl.store(scale_ptr + segment, pack_scale(best_scale, best_plain, largest), mask=inside)


def search_scales(
    weight: Tensor,  # float [N, K], contiguous
    codebook: Tensor,
    group_size: int,
    pairing: Pairing,
    multiples: Tensor,  # float32, those of the pair rule first
    pair_count: int,
    importance: Tensor | None,
) -> Tensor:
    """The best scale and rule of every group of columns or of every row: int16 `scale_shape`."""
    rows, columns = weight.shape
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device=weight.device)
    block = BLOCK_GROUPS if group_size > 0 else BLOCK_CHANNELS
    with torch.cuda.device_of(weight):
        ovp_quantize_kernel[(ceil_div(scale.numel(), block),)](
            weight,
            codebook,
            importance,
            multiples,
            scale,
            scale.numel(),
            columns,
            int(scale.shape[1]),
            pair_count,
            multiples.numel() - pair_count,
            ceil_div(columns, STEP_COLUMNS.value),
            GROUP_SIZE=kernel_group_size(group_size),
            OPTIMAL=pairing == "optimal",
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return scale


def ovp_quantize_triton(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: Pairing,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Search a scale and a rule per group for the least squared error, and encode.

    Args:
        weight: float32, bfloat16 or float16 [N, K]; any strides.
        codebook: int8 [32], valid.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: "optimal" or "paper".
        pair_grid: multiples, > 0; empty = the pair rule is not tried, for codebooks with plain levels.
        plain_grid: multiples, > 0, tried with both signs if the codebook has plain levels.
        importance: float32 [K], from 0 to 2^64, weighs the squared error of each column; None = all alike.

    Returns:
        codes uint8 [N, ceil(K / 2)], scale int16 `scale_shape(N, K, group_size)`.

    Raises:
        ValueError: weight holds NaN or Inf.

    Source: docs/format.md, section 8; OliVe, arXiv:2304.07493, section 3.4.
    """
    weight, codebook = weight.contiguous(), codebook.contiguous()
    importance = None if importance is None else importance.contiguous()
    signed = [sign * multiple for multiple in plain_grid for sign in (1.0, -1.0)]
    multiples = torch.tensor([*pair_grid, *signed], dtype=torch.float32, device=weight.device)
    search = search_per_tensor if group_size == PER_TENSOR else search_scales
    scale = search(weight, codebook, group_size, pairing, multiples, len(pair_grid), importance)
    return encode(weight, scale, codebook, group_size, pairing, importance), scale
