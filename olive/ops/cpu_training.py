"""CPU backend of the operators of training: StatsQ, LSQ and oscillations."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.ops.cpu import cpu_kernels, has_cpu_kernels
from olive.ops.lsq import check_lsq, check_lsq_backward, integer_range, shape_around
from olive.ops.native import FLOAT_TYPES
from olive.ops.oscillation import check_oscillation, dense_state, step_width
from olive.ops.schemas import library
from olive.ops.statsq import check_statsq


def _statsq(
    weight: Tensor,
    bits: int,
    group_size: int,
    isa: str,
    levels: Tensor | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
) -> None:
    """Fill in the results that are asked for."""
    rows, columns, groups = check_statsq(weight, bits, group_size)
    weight = weight.contiguous()
    results = (levels, codes, scale, margin)
    cpu_kernels().statsq(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        rows,
        columns,
        columns if groups == 1 else group_size,
        bits,
        *(0 if result is None else result.data_ptr() for result in results),
        isa,
    )


def statsq_cpu(weight: Tensor, bits: int, group_size: int, isa: str = "") -> Tensor:
    """`statsq` on the CPU kernels; `isa` names an instruction set, "" the best one."""
    levels = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _statsq(weight, bits, group_size, isa, levels=levels)
    return levels


def statsq_codes_cpu(weight: Tensor, bits: int, group_size: int, isa: str = "") -> tuple[Tensor, Tensor]:
    """`statsq_codes` on the CPU kernels."""
    rows, _, groups = check_statsq(weight, bits, group_size)
    codes = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty((rows, groups), dtype=torch.float32, device="cpu")
    _statsq(weight, bits, group_size, isa, codes=codes, scale=scale)
    return codes, scale


def statsq_margin_cpu(weight: Tensor, bits: int, group_size: int, isa: str = "") -> Tensor:
    """`statsq_margin` on the CPU kernels."""
    margin = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    _statsq(weight, bits, group_size, isa, margin=margin)
    return margin


def lsq_cpu(input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int, isa: str = "") -> Tensor:
    """`lsq` on the CPU kernels."""
    check_lsq(input, scale, bits, dim)
    input, scale = input.contiguous(), scale.contiguous()
    out = torch.empty_like(input)
    cpu_kernels().lsq(
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        *shape_around(input, scale, dim),
        scale.data_ptr(),
        *integer_range(bits, signed),
        signed and bits == 1,
        out.data_ptr(),
        isa,
    )
    return out


def lsq_backward_cpu(
    grad: Tensor, input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """`lsq_backward` on the CPU kernels; gradients of scales are summed in float64, in a fixed order."""
    check_lsq_backward(grad, input, scale, bits, dim)
    grad, input, scale = grad.contiguous(), input.contiguous(), scale.contiguous()
    grad_input, grad_scale = torch.empty_like(input), torch.empty_like(scale)
    cpu_kernels().lsq_backward(
        grad.data_ptr(),
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        *shape_around(input, scale, dim),
        scale.data_ptr(),
        *integer_range(bits, signed),
        signed and bits == 1,
        grad_input.data_ptr(),
        grad_scale.data_ptr(),
        isa,
    )
    return grad_input, grad_scale


def oscillation_cpu_(
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
    isa: str = "",
) -> Tensor:
    """`oscillation_` on the CPU kernels."""
    check_oscillation(weight, step, qmin, qmax, momentum, codes, direction, frequency)
    weight, step = weight.contiguous(), step.contiguous()
    rows = int(weight.shape[0])
    near = torch.empty(weight.shape, dtype=torch.bool, device="cpu")
    with dense_state(codes, direction, frequency) as state:
        cpu_kernels().oscillation(
            weight.data_ptr(),
            FLOAT_TYPES[weight.dtype],
            rows,
            weight.numel() // rows,
            step_width(weight, step),
            step.data_ptr(),
            step.numel() == 1,
            offset,
            qmin,
            qmax,
            momentum,
            1 - momentum,
            boundary,
            *(part.data_ptr() for part in state),
            near.data_ptr(),
            isa,
        )
    return near


if has_cpu_kernels():
    for _name, _function in (
        ("statsq", statsq_cpu),
        ("statsq_codes", statsq_codes_cpu),
        ("statsq_margin", statsq_margin_cpu),
        ("lsq", lsq_cpu),
        ("lsq_backward", lsq_backward_cpu),
        ("oscillation_", oscillation_cpu_),
    ):
        library.impl(_name, _function, "CPU")
