"""LSQ: values on their levels, and gradients of values and scales, as `olive.ops.lsq` defines them.

Values are a matrix: a row of it has one scale, or each column has one. Both passes read and write every value
once, so they are bound by memory. A program of the backward pass adds its share of the scales' gradients in
float32, over 2048 values of a row or 64 of a column, and stores it; torch adds the shares in float64. Nothing
is added atomically, so that the result is the same every time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from olive.kernels.launch import ceil_div
from olive.kernels.thresholds import clamped, nearest_whole

VALUES = 2048  # per block, of 4 warps: 16 for each thread
COLUMNS = 128  # of a block with a scale per column, backward: a line of memory of 16-bit values and more
LOOPS = 4  # blocks of rows that such a program adds up


class LsqPlan(NamedTuple):
    """The matrix, and its blocks."""

    rows: int
    columns: int
    scales: int
    per_column: bool
    block_rows: int
    block_columns: int
    loops: int  # blocks of rows per program

    @property
    def row_blocks(self) -> int:
        """Programs along the rows."""
        return ceil_div(self.rows, self.block_rows * self.loops)

    @property
    def column_blocks(self) -> int:
        """Programs along the columns."""
        return ceil_div(self.columns, self.block_columns)

    @property
    def grid(self) -> tuple[int]:
        """One dimension: the second one of a grid ends at 65535."""
        return (self.row_blocks * self.column_blocks,)


def plan_lsq(outer: int, scales: int, inner: int, backward: bool) -> LsqPlan:
    """For values [outer, scales, inner] with a scale for each place in the middle, none of them 0."""
    per_column = scales > 1 and inner == 1
    rows, columns = (outer, scales) if per_column else (outer * scales, inner)
    adds = backward and per_column
    width = min(triton.next_power_of_2(columns), COLUMNS if adds else VALUES)
    return LsqPlan(rows, columns, scales, per_column, VALUES // width, width, LOOPS if adds else 1)


@triton.jit
def lsq_round(
    x,  # float32 [R, C]
    scale,  # float32 [R, 1] or [1, C]
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IS_SIGN: tl.constexpr,
):
    """x / scale, what it is rounded to, and whether it is inside of the clamp."""
    steps = tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))
    inside = (steps >= QMIN) & (steps <= QMAX)
    codes = nearest_whole(clamped(steps, QMIN, QMAX))
    if IS_SIGN:
        codes = tl.where(steps >= 0.0, 1.0, -1.0)
    return steps, codes, inside


@triton.jit
def load_scales(
    scale_ptr,  # float32 [S]
    row,  # [R, 1]
    column,  # [1, C]
    columns,
    scales,  # S
    LEAST_SCALE: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    """The scales that count, [1, C] or [R, 1]."""
    if PER_COLUMN:
        scale = tl.load(scale_ptr + column, mask=column < columns, other=1.0)
    else:
        scale = tl.load(scale_ptr + row % scales)
    return tl.where(scale < LEAST_SCALE, LEAST_SCALE + 0.0, scale)


@triton.jit(do_not_specialize=["rows"])
def lsq_kernel(
    x_ptr,  # float [R, C]
    scale_ptr,  # float32 [S]
    out_ptr,  # float [R, C]
    rows,  # R
    columns,  # C
    scales,  # S: C of them, or row r has number r mod S
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IS_SIGN: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    scale = load_scales(scale_ptr, row, column, columns, scales, LEAST_SCALE, PER_COLUMN)
    mask = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    _, codes, _ = lsq_round(x, scale, QMIN, QMAX, IS_SIGN)
    tl.store(out_ptr + at, (codes * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def lsq_backward_kernel(
    grad_ptr,  # float [R, C]
    x_ptr,  # float [R, C]
    scale_ptr,  # float32 [S]
    out_ptr,  # float [R, C], gradient of x
    partial_ptr,  # float32 [R, blocks of columns], or [programs along rows, C] with a scale per column
    rows,  # R
    columns,  # C
    scales,  # S, as `lsq_kernel`
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IS_SIGN: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    LOOPS: tl.constexpr,  # blocks of rows, with a scale per column
):
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row_block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    total = tl.full([BLOCK_COLUMNS], 0.0, tl.float32)
    for loop in range(LOOPS):
        row = (row_block * LOOPS + loop) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        scale = load_scales(scale_ptr, row, column, columns, scales, LEAST_SCALE, PER_COLUMN)
        mask = (row < rows) & (column < columns)
        at = row.to(tl.int64) * columns + column
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        steps, codes, inside = lsq_round(x, scale, QMIN, QMAX, IS_SIGN)
        # A product, not a choice: a gradient of NaN is NaN outside of the clamp too.
        tl.store(out_ptr + at, (grad * inside.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)
        by_scale = tl.where(mask, grad * tl.where(inside, codes - steps, codes), 0.0)
        if PER_COLUMN:
            total += tl.sum(by_scale, 0)
        else:
            share = tl.sum(by_scale, 1)[:, None]
            tl.store(partial_ptr + row.to(tl.int64) * blocks + column_block, share, mask=row < rows)
    if PER_COLUMN:
        at = row_block.to(tl.int64) * columns + column
        tl.store(partial_ptr + at, total[None, :], mask=column < columns)


def lsq_triton(
    input: Tensor,
    scale: Tensor,
    shape: tuple[int, int, int],
    qmin: int,
    qmax: int,
    is_sign: bool,
    least_scale: float,
) -> Tensor:
    """The input on its levels.

    Args:
        input: float32, bfloat16 or float16, any shape and strides.
        scale: float32 [S].
        shape: of the input as [outer, S, inner].
        qmin, qmax: the range of levels.
        is_sign: levels -1 and 1 alone.
        least_scale: smaller ones count as it.

    Returns:
        The input's dtype and shape, contiguous.
    """
    input, scale = input.contiguous(), scale.contiguous()
    out = torch.empty_like(input)
    if input.numel() == 0:
        return out
    plan = plan_lsq(*shape, backward=False)
    with torch.cuda.device_of(input):
        lsq_kernel[plan.grid](
            input,
            scale,
            out,
            plan.rows,
            plan.columns,
            plan.scales,
            QMIN=qmin,
            QMAX=qmax,
            IS_SIGN=is_sign,
            LEAST_SCALE=least_scale,
            PER_COLUMN=plan.per_column,
            BLOCK_ROWS=plan.block_rows,
            BLOCK_COLUMNS=plan.block_columns,
            enable_fp_fusion=False,
        )
    return out


def lsq_backward_triton(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    shape: tuple[int, int, int],
    qmin: int,
    qmax: int,
    is_sign: bool,
    least_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input, in its dtype, and of the scale, float32; `grad` is the result's.

    Other arguments as for `lsq_triton`.
    """
    grad, input, scale = grad.contiguous(), input.contiguous(), scale.contiguous()
    grad_input = torch.empty_like(input)
    if input.numel() == 0:
        return grad_input, torch.zeros_like(scale)
    plan = plan_lsq(*shape, backward=True)
    per_column = plan.per_column
    shares = (plan.row_blocks, plan.columns) if per_column else (plan.rows, plan.column_blocks)
    partial = input.new_empty(shares, dtype=torch.float32)
    with torch.cuda.device_of(input):
        lsq_backward_kernel[plan.grid](
            grad,
            input,
            scale,
            grad_input,
            partial,
            plan.rows,
            plan.columns,
            plan.scales,
            QMIN=qmin,
            QMAX=qmax,
            IS_SIGN=is_sign,
            LEAST_SCALE=least_scale,
            PER_COLUMN=per_column,
            BLOCK_ROWS=plan.block_rows,
            BLOCK_COLUMNS=plan.block_columns,
            LOOPS=plan.loops,
            enable_fp_fusion=False,
        )
    if per_column:
        total = partial.sum(0, dtype=torch.float64)
    else:
        total = partial.view(-1, plan.scales, plan.column_blocks).sum((0, 2), dtype=torch.float64)
    outer, _, inner = shape
    return grad_input, (total / math.sqrt(qmax * outer * inner)).float()
