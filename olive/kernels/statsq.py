"""StatsQ: levels, codes and scales, or margins, as `olive.ops.statsq` defines them.

A span is what shares a scale: a group of columns, or a row. It is read once where it fits registers; the rest
of a longer row a second time, from the L2 cache. So the kernel is bound by memory: reading a weight and
writing its level. Magnitudes are summed in float64; the order practically never shows in the scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.formats.layout import groups_per_row
from olive.kernels.launch import ceil_div, kernel_group_size
from olive.kernels.quantize_activations import span_columns
from olive.kernels.thresholds import code_of, threshold_distance

VALUES = 4096  # per program of 4 warps: 32 for each thread
LONGEST_BLOCK = 8192  # columns of a row that stay in registers: 32 for each thread of 8 warps


@triton.jit
def store_statsq(
    x,  # float32 [SPANS, BLOCK]
    divisor,  # float32 [SPANS, 1]: the scale, or 1
    scale,  # float32 [SPANS, 1]
    at,  # int64 [SPANS, BLOCK]
    mask,
    levels_ptr,
    codes_ptr,
    margin_ptr,
    HALF: tl.constexpr,
):
    steps = tl.math.div_rn(x * HALF, tl.broadcast_to(divisor, x.shape))
    if levels_ptr is not None:
        level = (code_of(steps, -HALF, HALF - 1).to(tl.float32) + 0.5) * (1.0 / HALF) * scale
        tl.store(levels_ptr + at, level.to(levels_ptr.dtype.element_ty), mask=mask)
    if codes_ptr is not None:
        tl.store(codes_ptr + at, code_of(steps, -HALF, HALF - 1).to(tl.int8), mask=mask)
    if margin_ptr is not None:
        tl.store(margin_ptr + at, threshold_distance(steps, -HALF, HALF - 1), mask=mask)


@triton.jit(do_not_specialize=["spans"])
def statsq_kernel(
    weight_ptr,  # float [N, K]
    levels_ptr,  # float [N, K], None = not asked for, as the next three
    codes_ptr,  # int8 [N, K]
    scale_ptr,  # float32 [N, G]
    margin_ptr,  # float32 [N, K]
    spans,  # N G
    columns,  # K
    groups,  # G
    GROUP_SIZE: tl.constexpr,  # 0 = the whole row
    HALF: tl.constexpr,  # 2^(bits - 1)
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns
):
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    offset, start, end, stop = span_columns(span, spans, columns, groups, GROUP_SIZE)
    width = columns if GROUP_SIZE == 0 else GROUP_SIZE
    first = start[:, None] + tl.arange(0, BLOCK)[None, :]
    offset, stop = offset[:, None], stop[:, None]

    x = tl.load(weight_ptr + offset + first, mask=first < stop, other=0.0).to(tl.float32)
    total = tl.sum(tl.abs(x).to(tl.float64), 1)
    for k in range(BLOCK, width, BLOCK):
        rest = tl.load(weight_ptr + offset + first + k, mask=first + k < stop, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(rest).to(tl.float64), 1)
    scale = tl.math.div_rn(2.0 * total.to(tl.float32), (end - start).to(tl.float32))
    if scale_ptr is not None:
        tl.store(scale_ptr + span, scale, mask=span < spans)

    divisor, scale = tl.where(scale > 0.0, scale, 1.0)[:, None], scale[:, None]
    store_statsq(x, divisor, scale, offset + first, first < stop, levels_ptr, codes_ptr, margin_ptr, HALF)
    for k in range(BLOCK, width, BLOCK):
        rest = tl.load(weight_ptr + offset + first + k, mask=first + k < stop, other=0.0).to(tl.float32)
        store_statsq(
            rest,
            divisor,
            scale,
            offset + first + k,
            first + k < stop,
            levels_ptr,
            codes_ptr,
            margin_ptr,
            HALF,
        )


def _launch(
    weight: Tensor,
    bits: int,
    group_size: int,
    levels: Tensor | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
) -> None:
    """Fill in the results that are asked for."""
    rows = int(weight.shape[0])
    columns = weight.numel() // rows
    if group_size >= columns:
        group_size = -1
    weight = weight.contiguous()
    groups, group = groups_per_row(columns, group_size), kernel_group_size(group_size)
    block = min(triton.next_power_of_2(group or columns), LONGEST_BLOCK)
    spans = max(1, VALUES // block)
    with torch.cuda.device_of(weight):
        statsq_kernel[(ceil_div(rows * groups, spans),)](
            weight,
            levels,
            codes,
            scale,
            margin,
            rows * groups,
            columns,
            groups,
            GROUP_SIZE=group,
            HALF=1 << (bits - 1),
            SPANS=spans,
            BLOCK=block,
            num_warps=4 if block <= VALUES else 8,
            enable_fp_fusion=False,
        )


def statsq_triton(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The weight on its levels.

    Args:
        weight: float32, bfloat16 or float16 [N, ...], not empty; any strides.
        bits: 1 to 8.
        group_size: columns that share a scale; -1 per channel.

    Returns:
        The weight's dtype and shape, contiguous.
    """
    levels = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _launch(weight, bits, group_size, levels=levels)
    return levels


def statsq_codes_triton(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 of the weight's shape, scales float32 [N, G]; arguments as for `statsq_triton`."""
    rows = int(weight.shape[0])
    columns = weight.numel() // rows
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    scale = weight.new_empty((rows, groups_per_row(columns, group_size)), dtype=torch.float32)
    _launch(weight, bits, group_size, codes=codes, scale=scale)
    return codes, scale


def statsq_margin_triton(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Margins float32 of the weight's shape; arguments as for `statsq_triton`."""
    margin = weight.new_empty(weight.shape, dtype=torch.float32)
    _launch(weight, bits, group_size, margin=margin)
    return margin
