"""Gradients: `ovp_linear` is differentiable in its input and its bias; the quantized weight is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olive.ops.schemas import library


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scale, codebook, bias, out_features, group_size = inputs
    ctx.save_for_backward(codes, scale, codebook)
    ctx.in_features, ctx.out_features, ctx.group_size = input.shape[-1], out_features, group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_input = grad W, with W decoded to grad's dtype; grad_bias = sum of grad's rows in float32."""
    codes, scale, codebook = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        size = (ctx.in_features, ctx.group_size)
        if codes.dim() == 3:
            codes, scale = torch.ops.olive.ovp_unpack(codes, scale, ctx.out_features, *size)
        grad_input = grad @ torch.ops.olive.ovp_decode(codes, scale, codebook, *size, grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_input, None, None, None, grad_bias, None, None


torch.library.register_autograd("olive::ovp_linear", _backward, setup_context=_setup_context, lib=library)
