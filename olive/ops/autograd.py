"""Gradients: the linear operators are differentiable in input and bias; the quantized weight is frozen.

Where the input is quantized too, its rounding is passed straight through, as if it were the identity:
grad_input = grad W, also for values that were clipped or became victims. So adapters train on top of
quantized activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import olive.ops.schemas_quantized  # noqa: F401  (defines the operators)
from olive.ops.schemas import library


def _gradients(ctx: Any, grad: Tensor, of_input: bool, of_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """grad_input = grad W, with W decoded to grad's dtype; grad_bias = sum of grad's rows in float32.

    Args:
        ctx: holds codes, scale and codebook (None for 8 bits) as saved tensors, and in_features,
            out_features, group_size and bias_dtype.
        grad: [..., N].
        of_input, of_bias: which of the two are wanted; the others are None.
    """
    codes, scale, codebook = ctx.saved_tensors
    grad_input = grad_bias = None
    if of_input:
        size = (ctx.in_features, ctx.group_size)
        if codebook is None:
            weight = torch.ops.olive.ovp8_decode(codes, scale, *size, grad.dtype)
        else:
            if codes.dim() == 3:
                codes, scale = torch.ops.olive.ovp_unpack(codes, scale, ctx.out_features, *size)
            weight = torch.ops.olive.ovp_decode(codes, scale, codebook, *size, grad.dtype)
        grad_input = grad @ weight
    if of_bias:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_input, grad_bias


def _save(
    ctx: Any,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> None:
    ctx.save_for_backward(codes, scale, codebook)
    ctx.in_features, ctx.out_features, ctx.group_size = input.shape[-1], out_features, group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of operators whose first seven arguments are those of `ovp_linear`."""
    _save(ctx, *inputs[:7])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input, grad_bias = _gradients(ctx, grad, ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    return (grad_input, None, None, None, grad_bias, None, None)


def backward_quantized(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the activation's rounding."""
    return (*_backward(ctx, grad), *(None,) * 5)


def _setup_context8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scale, bias, out_features, group_size = inputs
    _save(ctx, input, codes, scale, None, bias, out_features, group_size)


def _backward8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input, grad_bias = _gradients(ctx, grad, ctx.needs_input_grad[0], ctx.needs_input_grad[3])
    return (grad_input, None, None, grad_bias, None, None)


for _name, _derivative, _setup in (
    ("ovp_linear", _backward, setup_context),
    ("ovp_linear_quantized", backward_quantized, setup_context),
    ("ovp8_linear", _backward8, _setup_context8),
):
    torch.library.register_autograd(f"olive::{_name}", _derivative, setup_context=_setup, lib=library)
