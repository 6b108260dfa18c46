"""Every operator once: its schema, what it checks, and the shapes it returns.

A weight [N, K] is stored as `codes` uint8 [N, ceil(K / 2)], `scale` int16 [N, G] and `codebook` int8 [32]
(`olive.formats`). Backends may hold codes and scale in a layout of their own (`olive.ops.packed`), made by
`ovp_pack`. `ovp_linear` takes either; three dimensions mean packed, in the layout of the tensor's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.layout import check_group_size, codes_shape, scale_shape
from olive.formats.ovp4 import PAIRINGS
from olive.ops.packed import PackedLayout, packed_layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_IMPORTANCE = 2.0**64  # keeps weighted squared errors, below 2^60 before weighing, inside float32

library = torch.library.Library("olive", "DEF")
library.define(
    "ovp_quantize(Tensor weight, Tensor codebook, int group_size, str pairing, float[] pair_grid, "
    "float[] plain_grid, Tensor? importance) -> (Tensor codes, Tensor scale)"
)
library.define(
    "ovp_encode(Tensor weight, Tensor scale, Tensor codebook, int group_size, str pairing) -> Tensor"
)
library.define(
    "ovp_decode(Tensor codes, Tensor scale, Tensor codebook, int in_features, int group_size, "
    "ScalarType dtype) -> Tensor"
)
library.define("ovp_pack(Tensor codes, Tensor scale, int in_features, int group_size) -> (Tensor, Tensor)")
library.define(
    "ovp_unpack(Tensor codes, Tensor scale, int out_features, int in_features, int group_size) "
    "-> (Tensor, Tensor)"
)
library.define(
    "ovp_linear(Tensor input, Tensor codes, Tensor scale, Tensor codebook, Tensor? bias, int out_features, "
    "int group_size) -> Tensor"
)


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Check type and shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:  # a torch.Size is a tuple
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_float(name: str, tensor: Tensor) -> None:
    """Check that a tensor is of a float type that kernels take."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def check_device(**tensors: Tensor | None) -> None:
    """Check that all tensors are on one device."""
    first: torch.device | None = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            present = {name: one for name, one in tensors.items() if one is not None}
            found = ", ".join(f"{name} on {one.device}" for name, one in present.items())
            raise ValueError(f"{next(iter(present))}: expected every tensor on one device, got {found}")


def check_weight(weight: Tensor) -> tuple[int, int]:
    """Check a float weight and return (N, K)."""
    check_float("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K] with N, K >= 1, got {tuple(weight.shape)}")
    return (int(weight.shape[0]), int(weight.shape[1]))


def check_pairing(pairing: str) -> None:
    """Check the name of a pair rule."""
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing: expected 'optimal' or 'paper', got {pairing!r}")


def check_grid(name: str, grid: list[float]) -> None:
    """Check multiples of a scale."""
    if not all(0 < multiple < float("inf") for multiple in grid):
        raise ValueError(f"{name}: expected positive finite multiples, got {grid}")


def check_quantize(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[int, int]:
    """Check the arguments of `ovp_quantize` (not their values) and return (N, K)."""
    rows, columns = check_weight(weight)
    check_tensor("codebook", codebook, torch.int8, (32,))
    check_group_size(group_size)
    check_pairing(pairing)
    check_grid("pair_grid", pair_grid)
    check_grid("plain_grid", plain_grid)
    if not pair_grid and not plain_grid:
        raise ValueError("pair_grid: expected at least one multiple in pair_grid or plain_grid, got none")
    if importance is not None:
        check_tensor("importance", importance, torch.float32, (columns,))
    check_device(weight=weight, codebook=codebook, importance=importance)
    return rows, columns


def check_values(codebook: Tensor, pair_grid: list[float], importance: Tensor | None) -> None:
    """Check what `ovp_quantize` needs of the values of its arguments, apart from the weight's."""
    if not pair_grid and not bool(codebook[16:].any()):
        raise ValueError("pair_grid: expected multiples for a codebook without plain levels, got none")
    if importance is not None and not bool(((importance >= 0) & (importance <= MAX_IMPORTANCE)).all()):
        raise ValueError(
            f"importance: expected values from 0 to 2^64, got {importance.min().item()} to "
            f"{importance.max().item()}; only ratios matter, so divide by the largest"
        )


def check_encode(
    weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: str
) -> tuple[int, int]:
    """Check the arguments of `ovp_encode` and return (N, K)."""
    rows, columns = check_weight(weight)
    check_group_size(group_size)
    check_pairing(pairing)
    check_tensor("scale", scale, torch.int16, scale_shape(rows, columns, group_size))
    check_tensor("codebook", codebook, torch.int8, (32,))
    check_device(weight=weight, scale=scale, codebook=codebook)
    return rows, columns


def check_canonical(codes: Tensor) -> None:
    """Check that codes are in the canonical layout."""
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape [N, ceil(K / 2)], got {tuple(codes.shape)}")


def check_packed(codes: Tensor, layout: PackedLayout | None = None) -> None:
    """Check that codes are in a packed layout, by default that of their device."""
    layout = layout or packed_layout(codes.device)
    if codes.dim() != 3:
        raise ValueError(f"codes: expected packed shape {layout.codes_text}, got {tuple(codes.shape)}")


def check_stored(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
    layout: PackedLayout | None = None,
) -> None:
    """Check a weight's stored tensors, canonical or packed; `layout` is by default that of their device."""
    check_group_size(group_size)
    layout = layout or packed_layout(codes.device)
    if rows < 1 or columns < 1:
        raise ValueError(f"out_features, in_features: expected at least 1, got {rows}, {columns}")
    if codes.dim() == 3:
        check_tensor("codes", codes, torch.uint8, layout.codes_shape(rows, columns, group_size))
        check_tensor("scale", scale, torch.int16, layout.scale_shape(rows, columns, group_size))
    else:
        check_tensor("codes", codes, torch.uint8, codes_shape(rows, columns))
        check_tensor("scale", scale, torch.int16, scale_shape(rows, columns, group_size))
    if codebook is not None:
        check_tensor("codebook", codebook, torch.int8, (32,))
    check_device(codes=codes, scale=scale, codebook=codebook)


def check_decode(
    codes: Tensor, scale: Tensor, codebook: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> int:
    """Check the arguments of `ovp_decode` and return N."""
    check_canonical(codes)
    check_stored(codes, scale, codebook, codes.shape[0], in_features, group_size)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return int(codes.shape[0])


def check_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    layout: PackedLayout | None = None,
) -> None:
    """Check the arguments of `ovp_linear`; packed codes are in `layout`, by default that of their device."""
    check_float("input", input)
    if input.dim() == 0:
        raise ValueError("input: expected shape [..., K], got a scalar")
    check_stored(codes, scale, codebook, out_features, int(input.shape[-1]), group_size, layout)
    if bias is not None:
        check_float("bias", bias)
        check_tensor("bias", bias, bias.dtype, (out_features,))
    check_device(input=input, codes=codes, bias=bias)


@torch.library.register_fake("olive::ovp_quantize", lib=library)
def _(weight, codebook, group_size, pairing, pair_grid, plain_grid, importance):  # type: ignore[no-untyped-def]
    rows, columns = check_quantize(weight, codebook, group_size, pairing, pair_grid, plain_grid, importance)
    codes = weight.new_empty(codes_shape(rows, columns), dtype=torch.uint8)
    return codes, weight.new_empty(scale_shape(rows, columns, group_size), dtype=torch.int16)


@torch.library.register_fake("olive::ovp_encode", lib=library)
def _(weight, scale, codebook, group_size, pairing):  # type: ignore[no-untyped-def]
    return weight.new_empty(
        codes_shape(*check_encode(weight, scale, codebook, group_size, pairing)), dtype=torch.uint8
    )


@torch.library.register_fake("olive::ovp_decode", lib=library)
def _(codes, scale, codebook, in_features, group_size, dtype):  # type: ignore[no-untyped-def]
    rows = check_decode(codes, scale, codebook, in_features, group_size, dtype)
    return codes.new_empty((rows, in_features), dtype=dtype)


@torch.library.register_fake("olive::ovp_pack", lib=library)
def _(codes, scale, in_features, group_size):  # type: ignore[no-untyped-def]
    check_canonical(codes)
    rows = int(codes.shape[0])
    check_stored(codes, scale, None, rows, in_features, group_size)
    layout, size = packed_layout(codes.device), (rows, in_features, group_size)
    return codes.new_empty(layout.codes_shape(*size)), scale.new_empty(layout.scale_shape(*size))


@torch.library.register_fake("olive::ovp_unpack", lib=library)
def _(codes, scale, out_features, in_features, group_size):  # type: ignore[no-untyped-def]
    check_packed(codes)
    check_stored(codes, scale, None, out_features, in_features, group_size)
    return (
        codes.new_empty(codes_shape(out_features, in_features)),
        scale.new_empty(scale_shape(out_features, in_features, group_size)),
    )


@torch.library.register_fake("olive::ovp_linear", lib=library)
def _(input, codes, scale, codebook, bias, out_features, group_size):  # type: ignore[no-untyped-def]
    check_linear(input, codes, scale, codebook, bias, out_features, group_size)
    return input.new_empty((*input.shape[:-1], out_features))
