"""Whole numbers and thresholds, as `olive.ops.thresholds` defines them, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped(
    value,  # float32
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """The value within LOW..HIGH; NaN stays, and -0 is not below 0."""
    value = tl.where(value < LOW, LOW + 0.0, value)
    return tl.where(value > HIGH, HIGH + 0.0, value)


@triton.jit
def nearest_whole(
    value,  # float32, at most 2^22 in magnitude, or NaN
):
    """The nearest whole number, ties to even, with the value's sign."""
    # 1.5 x 2^23: floats are whole numbers there, so that adding it rounds, and taking it away is exact.
    whole = (value + 12582912.0) - 12582912.0
    return tl.where(whole == 0.0, value * 0.0, whole)


@triton.jit
def code_of(
    position,  # float32, in steps
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
):
    """clamp(floor(position), QMIN, QMAX), int32; NaN counts as 0."""
    value = clamped(tl.where(position == position, position, 0.0), QMIN, QMAX)
    # Not by `tl.floor`, which takes negative subnormal numbers for 0 on a GPU.
    towards_zero = value.to(tl.int32)
    return towards_zero - (towards_zero.to(tl.float32) > value).to(tl.int32)


@triton.jit
def threshold_distance(
    position,  # float32, in steps
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Steps to the nearest threshold, a whole number from QMIN + 1 to QMAX."""
    return tl.abs(position - nearest_whole(clamped(position, QMIN + 1, QMAX)))
