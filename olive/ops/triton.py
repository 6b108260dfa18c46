"""Triton backend: checks arguments, then calls `olive.kernels`, which is imported when it is first needed."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from olive.formats.ovp4 import Pairing
from olive.ops import schemas
from olive.ops.reference import ovp_unpack_reference

_LEAST_CAPABILITY = 80  # bfloat16 products and asynchronous copies, for NVIDIA GPUs


@lru_cache
def missing(device: torch.device) -> str:
    """Why Triton cannot serve a device, in words; "" if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < _LEAST_CAPABILITY:
            return f"the Triton kernels need compute capability 8.0, the GPU has {major}.{minor}"
    return ""


def ovp_quantize_triton(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: Pairing,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ovp_quantize` in Triton."""
    from olive import kernels

    schemas.check_quantize(weight, codebook, group_size, pairing, pair_grid, plain_grid, importance)
    schemas.check_values(codebook, pair_grid, importance)
    return kernels.ovp_quantize_triton(
        weight, codebook, group_size, pairing, pair_grid, plain_grid, importance
    )


def ovp_encode_triton(
    weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: Pairing
) -> Tensor:
    """`ovp_encode` in Triton."""
    from olive import kernels

    schemas.check_encode(weight, scale, codebook, group_size, pairing)
    return kernels.ovp_encode_triton(weight, scale, codebook, group_size, pairing)


def ovp_decode_triton(
    codes: Tensor, scale: Tensor, codebook: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`ovp_decode` in Triton."""
    from olive import kernels

    schemas.check_decode(codes, scale, codebook, in_features, group_size, dtype)
    return kernels.ovp_decode_triton(codes, scale, codebook, in_features, group_size, dtype)


def ovp_linear_triton(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """`ovp_linear` in Triton, which reads canonical codes; packed ones are unpacked for the call."""
    from olive import kernels

    schemas.check_linear(input, codes, scale, codebook, bias, out_features, group_size)
    if codes.dim() == 3:
        codes, scale = ovp_unpack_reference(codes, scale, out_features, int(input.shape[-1]), group_size)
    return kernels.ovp_linear_triton(input, codes, scale, codebook, bias, out_features, group_size)
