"""Linear layers on quantized activations whose products are taken in floating point.

What integer products (`ovp_linear_quantized`) cannot do comes here: codebooks with levels above 127 (`flint4`
has the outliers 128 and 192, which are no int8), 8-bit pairs on either side, and rows so long that an int32
could overflow. The activation's levels are put into a float type that holds each of them exactly, the
carrier, and multiplied by `ovp_linear` or `ovp8_linear`.

Why 8-bit pairs are not multiplied as bytes: their levels reach 32768 and need two signed bytes each, so an
exact product takes four byte products where bfloat16 takes one at half the rate. That is twice as slow on AMX
and on GPUs, and no faster on VNNI. A bfloat16 holds every level (int8 needs 7 bits, abfloat 4), a product of
two is exact in float32, and what float32 sums round, 2^-24 of the largest partial sum, is far below the 2^-8
that 8-bit codes lose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olive.ops.autograd import backward_quantized, setup_context
from olive.ops.schemas import check_linear, library
from olive.ops.schemas_quantized import check_activations, check_linear8

library.define(
    "linear_float_activations(Tensor input, Tensor codes, Tensor scale, Tensor? codebook, Tensor? bias, "
    "int out_features, int group_size, str format, int activation_group_size, str pairing, "
    "Tensor? activation_codebook, Tensor? static_scale) -> Tensor"
)


def carrier_dtype(device: torch.device) -> torch.dtype:
    """Float type that holds every level and that the device multiplies fast: float32 on CPUs, else bfloat16.

    On CPUs float32, because there the kernels turn 16-bit inputs into 15-bit integers: small levels beside an
    outlier of 32768 would be lost. Of float32 they keep 23 bits.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _multiply(
    input: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor | None, bias: Tensor | None, *size: int
) -> Tensor:
    linear = torch.ops.olive
    if codebook is None:
        out: Tensor = linear.ovp8_linear(input, codes, scale, bias, *size)
    else:
        out = linear.ovp_linear(input, codes, scale, codebook, bias, *size)
    return out


def linear_float_activations_reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    format: str,
    activation_group_size: int,
    pairing: str,
    activation_codebook: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """y = x W^T + bias with x quantized first, for every pair of formats.

    One scale per row of x: the levels are multiplied in the carrier, the product times the scale in float32,
    plus the bias, rounded to the input's dtype. One per row and group: levels x scale, rounded to the carrier
    (by 2^-9 at most in bfloat16, 2^-24 in float32), is what is multiplied.

    Differentiable in input and bias: straight through the rounding, grad_input = grad W.

    Args:
        codebook: int8 [32] of a 4-bit weight; None: the weight has 8 bits.
        input, codes, scale, bias, out_features, group_size: as in `ovp_linear` and `ovp8_linear`.
        format, activation_group_size, pairing, activation_codebook, static_scale: as in
            `quantize_activations`.

    Returns:
        input's dtype, [..., N].
    """
    carrier = carrier_dtype(input.device)
    levels, scale_x = torch.ops.olive.quantize_activations(
        input, format, activation_group_size, pairing, activation_codebook, static_scale, carrier
    )
    weight = (codes, scale, codebook)
    out: Tensor
    if activation_group_size > 0:
        columns = input.shape[-1]
        values = levels.float() * scale_x.repeat_interleave(activation_group_size, dim=-1)[..., :columns]
        out = _multiply(values.to(carrier), *weight, bias, out_features, group_size)
        return out.to(input.dtype)
    out = _multiply(levels, *weight, None, out_features, group_size).float() * scale_x
    out = out if bias is None else out + bias.float()
    return out.to(input.dtype)


def _check(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    *activation: Any,
) -> None:
    check_activations(input, *activation)
    if codebook is None:
        check_linear8(input, codes, scale, bias, out_features, group_size)
    else:
        check_linear(input, codes, scale, codebook, bias, out_features, group_size)


@torch.library.register_fake("olive::linear_float_activations", lib=library)
def _(input, *arguments):  # type: ignore[no-untyped-def]
    _check(input, *arguments)
    return input.new_empty((*input.shape[:-1], arguments[4]))


library.impl("linear_float_activations", linear_float_activations_reference, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "olive::linear_float_activations", backward_quantized, setup_context=setup_context, lib=library
)
linear_float_activations = torch.ops.olive.linear_float_activations
