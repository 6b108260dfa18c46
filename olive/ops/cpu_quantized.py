"""CPU backend of the operators on quantized activations and on weights of eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.activations import DYNAMIC_GRIDS
from olive.formats.layout import codes_shape, groups_per_row, scale_shape
from olive.ops import schemas_quantized as schemas
from olive.ops.cpu import cpu_kernels, has_cpu_kernels, ovp_pack_cpu
from olive.ops.native import ACTIVATION_FORMATS, FLOAT_TYPES, LEVEL_TYPES
from olive.ops.schemas import library


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bias_type(bias: Tensor | None) -> int:
    return 0 if bias is None else FLOAT_TYPES[bias.dtype]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def quantize_activations_cpu(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: str,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    dtype: torch.dtype,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """`quantize_activations` on the CPU kernels; `isa` names an instruction set, "" the best one."""
    columns = schemas.check_activations(input, format, group_size, pairing, codebook, static_scale)
    schemas.check_levels(format, codebook, dtype)
    input, codebook, static_scale = input.contiguous(), _contiguous(codebook), _contiguous(static_scale)
    levels = torch.empty(input.shape, dtype=dtype, device="cpu")
    groups = groups_per_row(columns, group_size)
    scale = torch.empty((*input.shape[:-1], groups), dtype=torch.float32, device="cpu")
    cpu_kernels().quantize_activations(
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        input.numel() // columns,
        columns,
        ACTIVATION_FORMATS[format],
        group_size,
        pairing == "paper",
        _address(codebook),
        _address(static_scale),
        *DYNAMIC_GRIDS[format],
        levels.data_ptr(),
        LEVEL_TYPES[dtype],
        scale.data_ptr(),
        isa,
    )
    return levels, scale


def ovp_linear_quantized_cpu(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    format: str,
    activation_group_size: int,
    pairing: str,
    activation_codebook: Tensor | None,
    static_scale: Tensor | None,
    isa: str = "",
) -> Tensor:
    """`ovp_linear_quantized` on the CPU kernels; canonical codes are packed for the call."""
    columns = schemas.check_linear_quantized(
        input,
        codes,
        scale,
        codebook,
        bias,
        out_features,
        group_size,
        format,
        activation_group_size,
        pairing,
        activation_codebook,
        static_scale,
    )
    if codes.dim() == 2:
        codes, scale = ovp_pack_cpu(codes, scale, columns, group_size)
    input, codes, scale, codebook = (tensor.contiguous() for tensor in (input, codes, scale, codebook))
    bias, activation_codebook = _contiguous(bias), _contiguous(activation_codebook)
    static_scale = _contiguous(static_scale)
    out = torch.empty((*input.shape[:-1], out_features), dtype=input.dtype, device="cpu")
    arguments = (
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        input.numel() // columns,
        out_features,
        columns,
        group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        codebook.data_ptr(),
        _address(bias),
        _bias_type(bias),
        out.data_ptr(),
        ACTIVATION_FORMATS[format],
        activation_group_size,
        pairing == "paper",
        _address(activation_codebook),
        _address(static_scale),
        *DYNAMIC_GRIDS[format],
        isa,
    )
    try:
        cpu_kernels().linear_quantized(*arguments)
    except ValueError:  # it has looked at the codebooks already; say more than it can
        schemas.check_int8_levels("codebook", codebook)
        if activation_codebook is not None:
            schemas.check_int8_levels("activation_codebook", activation_codebook)
        raise
    return out


def ovp8_quantize_cpu(
    weight: Tensor, group_size: int, pairing: str, grid: list[float], isa: str = ""
) -> tuple[Tensor, Tensor]:
    """`ovp8_quantize` on the CPU kernels."""
    rows, columns = schemas.check_quantize8(weight, group_size, pairing, grid)
    weight = weight.contiguous()
    codes = torch.empty(codes_shape(rows, columns, bits=8), dtype=torch.uint8, device="cpu")
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device="cpu")
    finite = cpu_kernels().quantize8(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        rows,
        columns,
        group_size,
        pairing == "paper",
        grid,
        codes.data_ptr(),
        scale.data_ptr(),
        isa,
    )
    if not finite:
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return codes, scale


def ovp8_decode_cpu(
    codes: Tensor, scale: Tensor, in_features: int, group_size: int, dtype: torch.dtype, isa: str = ""
) -> Tensor:
    """`ovp8_decode` on the CPU kernels."""
    rows = schemas.check_decode8(codes, scale, in_features, group_size, dtype)
    codes, scale = codes.contiguous(), scale.contiguous()
    out = torch.empty((rows, in_features), dtype=dtype, device="cpu")
    cpu_kernels().decode8(
        codes.data_ptr(),
        scale.data_ptr(),
        rows,
        in_features,
        group_size,
        out.data_ptr(),
        FLOAT_TYPES[dtype],
        isa,
    )
    return out


def ovp8_linear_cpu(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    isa: str = "",
) -> Tensor:
    """`ovp8_linear` on the CPU kernels."""
    columns = schemas.check_linear8(input, codes, scale, bias, out_features, group_size)
    input, codes, scale, bias = input.contiguous(), codes.contiguous(), scale.contiguous(), _contiguous(bias)
    out = torch.empty((*input.shape[:-1], out_features), dtype=input.dtype, device="cpu")
    cpu_kernels().linear8(
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        input.numel() // columns,
        out_features,
        columns,
        group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        _address(bias),
        _bias_type(bias),
        out.data_ptr(),
        isa,
    )
    return out


if has_cpu_kernels():
    for _name, _function in (
        ("quantize_activations", quantize_activations_cpu),
        ("ovp_linear_quantized", ovp_linear_quantized_cpu),
        ("ovp8_quantize", ovp8_quantize_cpu),
        ("ovp8_decode", ovp8_decode_cpu),
        ("ovp8_linear", ovp8_linear_cpu),
    ):
        library.impl(_name, _function, "CPU")
