"""Triton backend of the operators of training, as `olive.ops.triton`."""

from __future__ import annotations

from torch import Tensor

from olive.ops.lsq import LEAST_SCALE, check_lsq, check_lsq_backward, integer_range, shape_around
from olive.ops.oscillation import check_oscillation, dense_state, step_width
from olive.ops.statsq import check_statsq


def statsq_triton(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """`statsq` in Triton."""
    from olive import kernels

    check_statsq(weight, bits, group_size)
    return kernels.statsq_triton(weight, bits, group_size)


def statsq_codes_triton(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """`statsq_codes` in Triton."""
    from olive import kernels

    check_statsq(weight, bits, group_size)
    return kernels.statsq_codes_triton(weight, bits, group_size)


def statsq_margin_triton(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """`statsq_margin` in Triton."""
    from olive import kernels

    check_statsq(weight, bits, group_size)
    return kernels.statsq_margin_triton(weight, bits, group_size)


def lsq_triton(input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int) -> Tensor:
    """`lsq` in Triton."""
    from olive import kernels

    check_lsq(input, scale, bits, dim)
    shape, levels = shape_around(input, scale, dim), integer_range(bits, signed)
    return kernels.lsq_triton(input, scale, shape, *levels, signed and bits == 1, LEAST_SCALE)


def lsq_backward_triton(
    grad: Tensor, input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int
) -> tuple[Tensor, Tensor]:
    """`lsq_backward` in Triton."""
    from olive import kernels

    check_lsq_backward(grad, input, scale, bits, dim)
    shape, levels = shape_around(input, scale, dim), integer_range(bits, signed)
    is_sign = signed and bits == 1
    return kernels.lsq_backward_triton(grad, input, scale, shape, *levels, is_sign, LEAST_SCALE)


def oscillation_triton_(
    weight: Tensor,
    step: Tensor,
    offset: float,
    qmin: int,
    qmax: int,
    momentum: float,
    boundary: float,
    codes: Tensor,
    direction: Tensor,
    frequency: Tensor,
) -> Tensor:
    """`oscillation_` in Triton."""
    from olive import kernels

    check_oscillation(weight, step, qmin, qmax, momentum, codes, direction, frequency)
    width = step_width(weight, step)
    with dense_state(codes, direction, frequency) as state:
        return kernels.oscillation_triton_(
            weight, step, width, offset, qmin, qmax, momentum, boundary, *state
        )
