"""Triton backend of the operators on quantized activations and on weights of eight bits.

As `olive.ops.triton`. Codebooks' values are not looked at, which would wait for the GPU: who quantizes to
int8 has made sure that the levels fit (`check_int8_levels`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.ovp4 import Pairing
from olive.ops import schemas_quantized as schemas
from olive.ops.reference import ovp_unpack_reference


def quantize_activations_triton(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: Pairing,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`quantize_activations` in Triton."""
    from olive import kernels

    schemas.check_activations(input, format, group_size, pairing, codebook, static_scale)
    schemas.check_levels(format, None, dtype)
    return kernels.quantize_activations_triton(
        input, format, group_size, pairing, codebook, static_scale, dtype
    )


def ovp_linear_quantized_triton(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    format: str,
    activation_group_size: int,
    pairing: Pairing,
    activation_codebook: Tensor | None,
    static_scale: Tensor | None,
) -> Tensor:
    """`ovp_linear_quantized` in Triton. It reads canonical codes; packed ones are unpacked for the call."""
    from olive import kernels

    activations = (format, activation_group_size, pairing, activation_codebook, static_scale)
    columns = schemas.check_linear_quantized(
        input, codes, scale, codebook, bias, out_features, group_size, *activations
    )
    if codes.dim() == 3:
        codes, scale = ovp_unpack_reference(codes, scale, out_features, columns, group_size)
    return kernels.ovp_linear_quantized_triton(
        input, codes, scale, codebook, bias, out_features, group_size, *activations
    )


def ovp8_quantize_triton(
    weight: Tensor, group_size: int, pairing: Pairing, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """`ovp8_quantize` in Triton."""
    from olive import kernels

    schemas.check_quantize8(weight, group_size, pairing, grid)
    return kernels.ovp8_quantize_triton(weight, group_size, pairing, grid)


def ovp8_decode_triton(
    codes: Tensor, scale: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`ovp8_decode` in Triton."""
    from olive import kernels

    schemas.check_decode8(codes, scale, in_features, group_size, dtype)
    return kernels.ovp8_decode_triton(codes, scale, in_features, group_size, dtype)


def ovp8_linear_triton(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """`ovp8_linear` in Triton."""
    from olive import kernels

    schemas.check_linear8(input, codes, scale, bias, out_features, group_size)
    return kernels.ovp8_linear_triton(input, codes, scale, bias, out_features, group_size)
