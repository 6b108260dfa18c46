"""Codes of weights in training, oscillations, weights near a threshold: see `olive.ops.oscillation`.

One pass over weight, codes, directions and frequencies, in place: bound by memory, 17 bytes for each float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.kernels.launch import ceil_div
from olive.kernels.quantize_activations import span_columns
from olive.kernels.thresholds import code_of, threshold_distance

VALUES = 2048  # per program of 4 warps: 16 for each thread


@triton.jit(do_not_specialize=["spans"])
def oscillation_kernel(
    weight_ptr,  # float [N, K]
    step_ptr,  # float32 [N, G], or one for all
    codes_ptr,  # int8 [N, K], updated as the next two
    direction_ptr,  # int8 [N, K]
    frequency_ptr,  # float32 [N, K]
    near_ptr,  # uint8 [N, K]
    spans,  # N G
    columns,  # K
    groups,  # G
    offset,  # float32, in steps
    momentum,
    keep,  # 1 - momentum
    boundary,  # float32, in steps
    WIDTH: tl.constexpr,  # of a group, 0 = the whole row
    ONE_STEP: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns
):
    blocks = tl.cdiv(columns if WIDTH == 0 else WIDTH, BLOCK)
    span = tl.program_id(0) // blocks * SPANS + tl.arange(0, SPANS)
    row, start, _, stop = span_columns(span, spans, columns, groups, WIDTH)
    column = start[:, None] + tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    at, mask = row[:, None] + column, column < stop[:, None]
    step = tl.load(step_ptr + (0 * span if ONE_STEP else span), mask=span < spans, other=1.0)[:, None]

    x = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    steps = tl.math.div_rn(x, tl.broadcast_to(step, x.shape))
    position = tl.where((step == 0.0) & (x == x), 0.0, steps) + offset
    code = code_of(position, QMIN, QMAX)
    change = code - tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int32)
    direction = tl.load(direction_ptr + at, mask=mask, other=0).to(tl.int32)
    sign = (change > 0).to(tl.int32) - (change < 0).to(tl.int32)
    oscillated = (sign != 0) & (sign == -direction)
    frequency = tl.load(frequency_ptr + at, mask=mask, other=0.0)
    tl.store(frequency_ptr + at, tl.where(oscillated, momentum, 0.0) + frequency * keep, mask=mask)
    tl.store(direction_ptr + at, tl.where(sign != 0, sign, direction).to(tl.int8), mask=mask)
    tl.store(codes_ptr + at, code.to(tl.int8), mask=mask)
    near = threshold_distance(position, QMIN, QMAX) <= boundary
    tl.store(near_ptr + at, near.to(tl.uint8), mask=mask)


def oscillation_triton_(
    weight: Tensor,
    step: Tensor,
    width: int,
    offset: float,
    qmin: int,
    qmax: int,
    momentum: float,
    boundary: float,
    codes: Tensor,
    direction: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Update codes, directions and frequencies, which are contiguous; say which weights are near a threshold.

    Args:
        weight: float32, bfloat16 or float16 [N, ...], not empty; any strides.
        step: float32 [N, G] or [1, 1].
        width: columns that share a step.
        offset, qmin, qmax, momentum, boundary, codes, direction, frequency: as for the operator.

    Returns:
        bool of the weight's shape.
    """
    weight, step = weight.contiguous(), step.contiguous()
    rows = int(weight.shape[0])
    columns = weight.numel() // rows
    near = weight.new_empty(weight.shape, dtype=torch.bool)
    groups = ceil_div(columns, width)
    block = min(triton.next_power_of_2(width), VALUES)
    spans = VALUES // block
    with torch.cuda.device_of(weight):
        oscillation_kernel[(ceil_div(rows * groups, spans) * ceil_div(width, block),)](
            weight,
            step,
            codes,
            direction,
            frequency,
            near.view(torch.uint8),
            rows * groups,
            columns,
            groups,
            offset,
            momentum,
            1 - momentum,
            boundary,
            WIDTH=0 if groups == 1 else width,
            ONE_STEP=step.numel() == 1,
            QMIN=qmin,
            QMAX=qmax,
            SPANS=spans,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return near
