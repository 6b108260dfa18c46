"""Triton backend of the linear operator on uniform integer weights, as `olive.ops.triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.ops.lsq import integer_range
from olive.ops.uniform import check_uniform_linear, quantized_input, uniform_linear_reference


def uniform_linear_triton(
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
) -> Tensor:
    """`uniform_linear` in Triton; groups that are no multiple of 32 columns go to the reference."""
    from olive import kernels
    from olive.kernels.uniform_linear import block_columns

    how = (input_scale, input_offset, input_bits, input_signed)
    rows = check_uniform_linear(input, codes, scale, bias, bits, group_size, *how)
    columns = int(input.shape[-1])
    weight = (codes, scale, bias, bits, mid_rise, group_size)
    if not block_columns(columns, group_size):
        return uniform_linear_reference(input, *weight, *how)
    shape = (*input.shape[:-1], rows)
    if input_scale is None:
        out = kernels.uniform_linear_triton(input.reshape(-1, columns), *weight, None, False, input.dtype)
        return out.view(shape)
    q, used = quantized_input(input, input_scale, input_offset, input_bits, input_signed)
    spoilt = q.isnan().any(-1)
    shifted = integer_range(input_bits, input_signed)[1] > 127
    levels = (q.nan_to_num() - (128 if shifted else 0)).to(torch.int8).reshape(-1, columns)
    row_scale = torch.where(spoilt, torch.nan, used.expand(q.shape)[..., 0]).reshape(-1)
    out = kernels.uniform_linear_triton(levels, *weight, row_scale, shifted, input.dtype)
    return out.view(shape)
