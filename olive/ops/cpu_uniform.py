"""CPU backend of the linear operator on uniform integer weights."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from olive.formats.layout import PER_CHANNEL
from olive.ops.cpu import cpu_kernels, has_cpu_kernels
from olive.ops.lsq import integer_range
from olive.ops.native import FLOAT_TYPES
from olive.ops.schemas import library
from olive.ops.uniform import check_uniform_linear, uniform_linear_reference

GROUP_UNIT = 32  # columns: a lane of a vector has one scale
_LOG = logging.getLogger("olive")


@lru_cache
def _log_once(reason: str) -> None:
    _LOG.warning("uniform_linear: using the slow reference operator, because %s", reason)


def _missing(columns: int, group_size: int) -> str:
    """Why the kernels do not take a weight, in words; "" if they do."""
    if group_size != PER_CHANNEL and group_size < columns and group_size % GROUP_UNIT:
        return f"the kernels need groups of a multiple of {GROUP_UNIT} columns, got {group_size}"
    most = int(cpu_kernels().uniform_max_k)
    return "" if columns <= most else f"the kernels need at most {most} columns, got {columns}"


def uniform_linear_cpu(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    mid_rise: bool,
    group_size: int,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    input_bits: int,
    input_signed: bool,
    isa: str = "",
) -> Tensor:
    """`uniform_linear` on the CPU kernels; `isa` names an instruction set, "" the best one.

    Groups of other sizes than multiples of 32, and rows of more than 2^18 columns, go to the reference.
    """
    how = (input_scale, input_offset, input_bits, input_signed)
    rows = check_uniform_linear(input, codes, scale, bias, bits, group_size, *how)
    columns = int(input.shape[-1])
    if reason := _missing(columns, group_size):
        _log_once(reason)
        return uniform_linear_reference(input, codes, scale, bias, bits, mid_rise, group_size, *how)
    input, codes, scale = input.contiguous(), codes.contiguous(), scale.contiguous()
    bias, input_scale, input_offset = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, input_scale, input_offset)
    )
    qmin, qmax = (0, 0) if input_scale is None else integer_range(input_bits, input_signed)
    out = torch.empty((*input.shape[:-1], rows), dtype=input.dtype, device="cpu")
    cpu_kernels().uniform_linear(
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        input.numel() // columns,
        rows,
        columns,
        bits,
        mid_rise,
        PER_CHANNEL if group_size >= columns else group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        out.data_ptr(),
        0 if input_scale is None else input_scale.data_ptr(),
        1 if input_scale is None else input_scale.shape[0],
        0 if input_offset is None else input_offset.data_ptr(),
        qmin,
        qmax,
        isa,
    )
    return out


if has_cpu_kernels():
    library.impl("uniform_linear", uniform_linear_cpu, "CPU")
