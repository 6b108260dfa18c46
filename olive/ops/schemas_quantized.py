"""Schemas of the operators on quantized activations and on weights of eight bits; see `olive.ops.schemas`.

An activation [..., K] has one float32 scale per row, or per row and group of columns: [..., G]. Static scales
are stored like those of weights, int16 [1] without a rule bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.activations import ACTIVATION_FORMATS, MAX_INT32_TERMS, integer_block
from olive.formats.layout import PER_TENSOR, check_group_size, codes_shape, groups_per_row, scale_shape
from olive.ops.packed import PackedLayout
from olive.ops.schemas import (
    FLOATS,
    check_device,
    check_float,
    check_grid,
    check_linear,
    check_pairing,
    check_tensor,
    check_weight,
    library,
)

library.define(
    "quantize_activations(Tensor input, str format, int group_size, str pairing, Tensor? codebook, "
    "Tensor? static_scale, ScalarType dtype) -> (Tensor levels, Tensor scale)"
)
library.define(
    "ovp_linear_quantized(Tensor input, Tensor codes, Tensor scale, Tensor codebook, Tensor? bias, "
    "int out_features, int group_size, str format, int activation_group_size, str pairing, "
    "Tensor? activation_codebook, Tensor? static_scale) -> Tensor"
)
library.define(
    "ovp8_quantize(Tensor weight, int group_size, str pairing, float[] grid) -> (Tensor codes, Tensor scale)"
)
library.define(
    "ovp8_decode(Tensor codes, Tensor scale, int in_features, int group_size, ScalarType dtype) -> Tensor"
)
library.define(
    "ovp8_linear(Tensor input, Tensor codes, Tensor scale, Tensor? bias, int out_features, int group_size) "
    "-> Tensor"
)


def check_activations(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: str,
    codebook: Tensor | None,
    static_scale: Tensor | None,
) -> int:
    """Check how an activation is to be quantized and return K."""
    check_float("input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input: expected shape [..., K] with K >= 1, got {tuple(input.shape)}")
    if format not in ACTIVATION_FORMATS:
        raise ValueError(f"format: expected one of {', '.join(ACTIVATION_FORMATS)}, got {format!r}")
    check_group_size(group_size)
    check_pairing(pairing)
    if (codebook is None) == (format == "ovp4"):
        wanted, found = ("one", "none") if format == "ovp4" else ("none", "one")
        raise ValueError(f"codebook: expected {wanted} with format {format!r}, got {found}")
    if codebook is not None:
        check_tensor("codebook", codebook, torch.int8, (32,))
    if (static_scale is None) == (group_size == PER_TENSOR):
        wanted, found = ("one", "none") if group_size == PER_TENSOR else ("none", "one")
        raise ValueError(f"static_scale: expected {wanted} with group_size {group_size}, got {found}")
    if static_scale is not None:
        check_tensor("static_scale", static_scale, torch.int16, (1,))
    check_device(input=input, codebook=codebook, static_scale=static_scale)
    return int(input.shape[-1])


def check_level_dtype(format: str, dtype: torch.dtype) -> None:
    """Check that a type can hold the levels of a format."""
    if dtype not in (torch.int8, *FLOATS):
        raise TypeError(f"dtype: expected int8, float32, bfloat16 or float16, got {dtype}")
    if dtype == torch.int8 and format == "ovp8":
        raise TypeError("dtype: expected a float type for format 'ovp8', whose levels reach 32768, got int8")


def check_levels(format: str, codebook: Tensor | None, dtype: torch.dtype) -> None:
    """Check that a type holds the levels of a format exactly; reads the codebook's values."""
    check_level_dtype(format, dtype)
    if dtype == torch.int8 and codebook is not None:
        check_int8_levels("codebook", codebook)


def check_int8_levels(name: str, codebook: Tensor) -> None:
    """Refuse codebooks with levels that are no int8.

    Raises:
        ValueError: such a codebook; `flint4` is one.
    """
    largest = int(codebook[:16].view(torch.uint8).max())
    if largest > 127:
        raise ValueError(
            f"{name}: expected levels up to 127 for integer products, got {largest}; use codebook 'int4', "
            f"'nf4' or 'adaptive', or multiply in floating point with ovp_linear"
        )


def check_linear_quantized(
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
    layout: PackedLayout | None = None,
) -> int:
    """Check the arguments of `ovp_linear_quantized`, not the codebooks' values, and return K."""
    columns = check_activations(
        input, format, activation_group_size, pairing, activation_codebook, static_scale
    )
    check_linear(input, codes, scale, codebook, bias, out_features, group_size, layout)
    if format == "ovp8":
        raise ValueError("format: expected 'int8' or 'ovp4' for integer products, got 'ovp8'")
    terms = integer_block(columns, group_size, activation_group_size)
    if terms > MAX_INT32_TERMS:
        raise ValueError(
            f"in_features: expected at most {MAX_INT32_TERMS} columns under one scale, got {terms}: the sum "
            f"of their products could pass an int32; use groups of 32, 64 or 128 for weights or activations"
        )
    return columns


def check_quantize8(weight: Tensor, group_size: int, pairing: str, grid: list[float]) -> tuple[int, int]:
    """Check the arguments of `ovp8_quantize` and return (N, K)."""
    rows, columns = check_weight(weight)
    check_group_size(group_size)
    check_pairing(pairing)
    check_grid("grid", grid)
    if not grid:
        raise ValueError("grid: expected at least one multiple, got none")
    return rows, columns


def check_stored8(codes: Tensor, scale: Tensor, rows: int, columns: int, group_size: int) -> None:
    """Check the stored tensors of a weight of eight bits."""
    check_group_size(group_size)
    if rows < 1 or columns < 1:
        raise ValueError(f"out_features, in_features: expected at least 1, got {rows}, {columns}")
    check_tensor("codes", codes, torch.uint8, codes_shape(rows, columns, bits=8))
    check_tensor("scale", scale, torch.int16, scale_shape(rows, columns, group_size))
    check_device(codes=codes, scale=scale)


def check_decode8(codes: Tensor, scale: Tensor, in_features: int, group_size: int, dtype: torch.dtype) -> int:
    """Check the arguments of `ovp8_decode` and return N."""
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape [N, 2 ceil(K / 2)], got {tuple(codes.shape)}")
    check_stored8(codes, scale, int(codes.shape[0]), in_features, group_size)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return int(codes.shape[0])


def check_linear8(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> int:
    """Check the arguments of `ovp8_linear` and return K."""
    check_float("input", input)
    if input.dim() == 0:
        raise ValueError("input: expected shape [..., K], got a scalar")
    check_stored8(codes, scale, out_features, int(input.shape[-1]), group_size)
    if bias is not None:
        check_float("bias", bias)
        check_tensor("bias", bias, bias.dtype, (out_features,))
    check_device(input=input, codes=codes, bias=bias)
    return int(input.shape[-1])


@torch.library.register_fake("olive::quantize_activations", lib=library)
def _(input, format, group_size, pairing, codebook, static_scale, dtype):  # type: ignore[no-untyped-def]
    columns = check_activations(input, format, group_size, pairing, codebook, static_scale)
    check_level_dtype(format, dtype)
    scale_size = (*input.shape[:-1], groups_per_row(columns, group_size))
    return input.new_empty(input.shape, dtype=dtype), input.new_empty(scale_size, dtype=torch.float32)


@torch.library.register_fake("olive::ovp_linear_quantized", lib=library)
def _(input, *arguments):  # type: ignore[no-untyped-def]
    check_linear_quantized(input, *arguments)
    out_features = arguments[4]
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("olive::ovp8_quantize", lib=library)
def _(weight, group_size, pairing, grid):  # type: ignore[no-untyped-def]
    rows, columns = check_quantize8(weight, group_size, pairing, grid)
    codes = weight.new_empty(codes_shape(rows, columns, bits=8), dtype=torch.uint8)
    return codes, weight.new_empty(scale_shape(rows, columns, group_size), dtype=torch.int16)


@torch.library.register_fake("olive::ovp8_decode", lib=library)
def _(codes, scale, in_features, group_size, dtype):  # type: ignore[no-untyped-def]
    rows = check_decode8(codes, scale, in_features, group_size, dtype)
    return codes.new_empty((rows, in_features), dtype=dtype)


@torch.library.register_fake("olive::ovp8_linear", lib=library)
def _(input, codes, scale, bias, out_features, group_size):  # type: ignore[no-untyped-def]
    check_linear8(input, codes, scale, bias, out_features, group_size)
    return input.new_empty((*input.shape[:-1], out_features))
