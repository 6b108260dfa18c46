"""Linear layers on uniform integer weights, with the input as it is or quantized (LSQ) to integers.

    input as it is:   y = x W^T + b,   W = scale * level
    input quantized:  y = s (sum_g scale_g sum_k q level) + b,  q = clamp(round((x + offset) / s), qmin, qmax)

Rounding is half to even; scales s below 1e-5 count as 1e-5; q of 1 bit with sign is -1 or 1. Schema, checks,
and the definition in plain PyTorch, which serves every device.

Source: Esser et al., arXiv:1902.08153, and Liu et al., arXiv:2302.02210, at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olive.formats.uniform import (
    doubled_zero,
    expand_uniform_scale,
    uniform_codes_shape,
    uniform_decode_values,
    uniform_scale_shape,
    unpack_codes,
)
from olive.ops.lsq import LEAST_SCALE, integer_range
from olive.ops.schemas import FLOATS, check_device, check_float, check_tensor, library

library.define(
    "uniform_linear(Tensor input, Tensor codes, Tensor scale, Tensor? bias, int bits, bool mid_rise, "
    "int group_size, Tensor? input_scale, Tensor? input_offset, int input_bits, bool input_signed) -> Tensor"
)
library.define(
    "uniform_decode(Tensor codes, Tensor scale, int in_features, int bits, bool mid_rise, int group_size, "
    "ScalarType dtype) -> Tensor"
)


def check_uniform_stored(codes: Tensor, scale: Tensor, in_features: int, bits: int, group_size: int) -> int:
    """Check a weight's stored tensors, not their values, and return N."""
    if codes.dim() != 2 or codes.shape[0] < 1 or in_features < 1:
        raise ValueError(
            f"codes: expected shape [N, bytes] with N, K >= 1, got {tuple(codes.shape)}, K = {in_features}"
        )
    rows = int(codes.shape[0])
    check_tensor("codes", codes, torch.uint8, uniform_codes_shape(rows, in_features, bits))
    check_tensor("scale", scale, torch.float32, uniform_scale_shape(rows, in_features, group_size))
    check_device(codes=codes, scale=scale)
    return rows


def check_uniform_decode(
    codes: Tensor, scale: Tensor, in_features: int, bits: int, group_size: int, dtype: torch.dtype
) -> int:
    """Check the arguments of `uniform_decode` and return N."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return check_uniform_stored(codes, scale, in_features, bits, group_size)


def check_uniform_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    input_bits: int,
    input_signed: bool,
) -> int:
    """Check the arguments of `uniform_linear`, not their values, and return N."""
    check_float("input", input)
    if input.dim() == 0:
        raise ValueError("input: expected shape [..., K], got a scalar")
    columns = int(input.shape[-1])
    rows = check_uniform_stored(codes, scale, columns, bits, group_size)
    if bias is not None:
        check_float("bias", bias)
        check_tensor("bias", bias, bias.dtype, (rows,))
    if input_scale is None:
        if input_offset is not None:
            raise ValueError("input_offset: expected none without an input_scale, got one")
    else:
        integer_range(input_bits, input_signed)
        per_token = input_scale.shape != (1,) and input.dim() > 1
        check_tensor("input_scale", input_scale, torch.float32, (int(input.shape[-2]) if per_token else 1,))
        if input_offset is not None:
            check_tensor("input_offset", input_offset, torch.float32, (columns,))
    check_device(input=input, codes=codes, bias=bias, input_scale=input_scale, input_offset=input_offset)
    return rows


@torch.library.register_fake("olive::uniform_linear", lib=library)
def _(  # type: ignore[no-untyped-def]
    input,
    codes,
    scale,
    bias,
    bits,
    mid_rise,
    group_size,
    input_scale,
    input_offset,
    input_bits,
    input_signed,
):
    how = (input_scale, input_offset, input_bits, input_signed)
    rows = check_uniform_linear(input, codes, scale, bias, bits, group_size, *how)
    return input.new_empty((*input.shape[:-1], rows))


@torch.library.register_fake("olive::uniform_decode", lib=library)
def _(codes, scale, in_features, bits, mid_rise, group_size, dtype):  # type: ignore[no-untyped-def]
    rows = check_uniform_decode(codes, scale, in_features, bits, group_size, dtype)
    return codes.new_empty((rows, in_features), dtype=dtype)


def quantized_input(
    input: Tensor, scale: Tensor, offset: Tensor | None, bits: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """q, float32 [..., K] of whole numbers, and the scales that count, float32, broadcastable to [..., 1].

    A NaN stays one, and so does all that its row gives; an infinity takes the last level.
    """
    qmin, qmax = integer_range(bits, signed)
    used = scale.clamp(min=LEAST_SCALE)[:, None] if input.dim() > 1 else scale.clamp(min=LEAST_SCALE)
    steps = (input.float() if offset is None else input.float() + offset) / used
    if signed and bits == 1:
        return torch.where(steps.isnan(), steps, torch.where(steps >= 0, 1.0, -1.0)), used
    return steps.clamp(qmin, qmax).round(), used


def uniform_linear_reference(
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
    """Multiply with a weight of integer codes.

    Without an input_scale the products are float32's with the decoded weight. With one, sums of integers are
    exact; with one scale per row of the weight the rest is, in float32, sum * scale * s + bias, each rounded
    once; with more, their sum over groups is rounded once before that.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        codes: uint8 [N, ceil(K w / 8)], packed (`olive.formats.uniform`).
        scale: float32 [N, G], the step sizes.
        bias: float [N] or None.
        bits, mid_rise: the weight's grid.
        group_size: -1 per channel, else columns per group.
        input_scale: float32 [1], or [T] with T = input.shape[-2]; None = the input is not quantized.
        input_offset: float32 [K], added to the input before it is quantized, or None.
        input_bits, input_signed: of q; not looked at without an input_scale.

    Returns:
        input's dtype, [..., N]. A row with a NaN gives NaN, and so does an infinity that is not quantized.

    Raises:
        TypeError, ValueError: another type or shape, another device, or a number out of its range.
    """
    how = (input_scale, input_offset, input_bits, input_signed)
    check_uniform_linear(input, codes, scale, bias, bits, group_size, *how)
    columns = int(input.shape[-1])
    added = None if bias is None else bias.float()
    if input_scale is None:
        weight = uniform_decode_values(codes, scale, columns, bits, mid_rise, group_size)
        spoilt = ~torch.isfinite(input).all(-1, keepdim=True)
        out = torch.nn.functional.linear(input.float(), weight, added)
        return torch.where(spoilt, torch.nan, out).to(input.dtype)
    q, used = quantized_input(input, input_scale, input_offset, input_bits, input_signed)
    doubled = 2 * unpack_codes(codes, columns, bits).double() - doubled_zero(bits, mid_rise)
    if scale.shape[1] == 1:
        total = (q.double() @ doubled.t()).float() * 0.5 * scale[:, 0]
    else:
        weight = doubled * expand_uniform_scale(scale, columns, group_size).double()
        total = (q.double() @ weight.t() * 0.5).float()
    out = total * used
    return (out if added is None else out + added).to(input.dtype)


def uniform_decode_reference(
    codes: Tensor,
    scale: Tensor,
    in_features: int,
    bits: int,
    mid_rise: bool,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight as floats: level times scale in float32, rounded to `dtype`.

    Args:
        codes, scale, bits, mid_rise, group_size: as for `uniform_linear_reference`.
        in_features: K.
        dtype: float32, bfloat16 or float16.

    Returns:
        dtype, [N, K].

    Raises:
        TypeError, ValueError: another type or shape, another device, or a number out of its range.
    """
    check_uniform_decode(codes, scale, in_features, bits, group_size, dtype)
    return uniform_decode_values(codes, scale, in_features, bits, mid_rise, group_size).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scale, bias, *ctx.grid = inputs[:7]
    ctx.save_for_backward(codes, scale)
    ctx.in_features = input.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_input = grad W, straight through the input's rounding; the weight and all scales are frozen."""
    codes, scale = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = grad @ torch.ops.olive.uniform_decode(
            codes, scale, ctx.in_features, *ctx.grid, grad.dtype
        )
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, codes.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_input, None, None, grad_bias, *(None,) * 7)


library.impl("uniform_linear", uniform_linear_reference, "CompositeExplicitAutograd")
library.impl("uniform_decode", uniform_decode_reference, "CompositeExplicitAutograd")
torch.library.register_autograd("olive::uniform_linear", _backward, setup_context=_setup_context, lib=library)
uniform_linear = torch.ops.olive.uniform_linear
uniform_decode = torch.ops.olive.uniform_decode
