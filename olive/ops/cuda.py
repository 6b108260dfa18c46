"""CUDA backend: starts the kernels of `olive._cuda`, where that module was built, on the current stream."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from olive.formats.layout import PER_TENSOR, codes_shape, scale_shape
from olive.ops import schemas
from olive.ops.gpu_dispatch import Gpu, Plan, choose_linear
from olive.ops.native import FLOAT_TYPES
from olive.ops.packed import CUDA_LAYOUT

_ALIGNMENT = 16  # bytes of a load


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("olive._cuda")
    except ImportError:
        return None


_MODULE = _load()


def missing(device: torch.device) -> str:
    """Why `olive._cuda` cannot serve a device, in words; "" if it can."""
    if _MODULE is None:
        return (
            "olive._cuda was not built: it takes a CUDA compiler (nvcc 12.8 or newer) when olive is installed"
        )
    if torch.version.hip is not None:
        return "olive._cuda is for NVIDIA GPUs"
    reason: str = _MODULE.unsupported(torch.cuda.current_device() if device.index is None else device.index)
    return reason


def architectures() -> str:
    """What the module was built for, "" where it was not built."""
    return "" if _MODULE is None else str(_MODULE.architectures)


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """What the choice of a kernel depends on. The device has an index, as every tensor's has."""
    return Gpu(**kernels().device_properties(device.index or 0))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one, as launches need it."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Address of the current stream."""
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


def kernels() -> ModuleType:
    """The compiled module."""
    if _MODULE is None:
        raise RuntimeError("olive._cuda: expected a compiled module, got none; build it with `pip install .`")
    return _MODULE


def aligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address that wide loads can take."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _check_finite(not_finite: Tensor) -> None:
    if bool(not_finite.item()):
        raise ValueError("weight: expected finite values, got NaN or Inf")


def ovp_quantize_cuda(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ovp_quantize` on the GPU; waits for the result, to report values that are not finite."""
    rows, columns = schemas.check_quantize(
        weight, codebook, group_size, pairing, pair_grid, plain_grid, importance
    )
    schemas.check_values(codebook, pair_grid, importance)
    weight, codebook = aligned(weight), codebook.contiguous()
    importance = None if importance is None else importance.contiguous()
    grid = torch.tensor([*pair_grid, *plain_grid], dtype=torch.float32, device=weight.device)
    candidates = len(pair_grid) + 2 * len(plain_grid)
    scratch_size = rows * (2 + candidates) if group_size == PER_TENSOR else 0
    scratch = torch.empty(scratch_size, dtype=torch.float64, device=weight.device)
    codes = torch.empty(codes_shape(rows, columns), dtype=torch.uint8, device=weight.device)
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device=weight.device)
    not_finite = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with on_device(weight.device):
        kernels().quantize(
            weight.data_ptr(),
            FLOAT_TYPES[weight.dtype],
            rows,
            columns,
            group_size,
            codebook.data_ptr(),
            pairing == "paper",
            grid.data_ptr() if pair_grid else 0,
            len(pair_grid),
            grid.data_ptr() + 4 * len(pair_grid) if plain_grid else 0,
            len(plain_grid),
            0 if importance is None else importance.data_ptr(),
            scratch.data_ptr() if scratch_size else 0,
            codes.data_ptr(),
            scale.data_ptr(),
            not_finite.data_ptr(),
            stream_of(weight.device),
        )
    _check_finite(not_finite)
    return codes, scale


def ovp_encode_cuda(weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: str) -> Tensor:
    """`ovp_encode` on the GPU; waits for the result, to report values that are not finite."""
    rows, columns = schemas.check_encode(weight, scale, codebook, group_size, pairing)
    weight, scale, codebook = aligned(weight), scale.contiguous(), codebook.contiguous()
    codes = torch.empty(codes_shape(rows, columns), dtype=torch.uint8, device=weight.device)
    not_finite = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with on_device(weight.device):
        kernels().encode(
            weight.data_ptr(),
            FLOAT_TYPES[weight.dtype],
            rows,
            columns,
            group_size,
            codebook.data_ptr(),
            pairing == "paper",
            scale.data_ptr(),
            codes.data_ptr(),
            not_finite.data_ptr(),
            stream_of(weight.device),
        )
    _check_finite(not_finite)
    return codes


def _decode(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of either layout to [N, K]."""
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    with on_device(codes.device):
        kernels().decode(
            codes.data_ptr(),
            scale.data_ptr(),
            codebook.data_ptr(),
            rows,
            columns,
            group_size,
            codes.dim() == 3,
            out.data_ptr(),
            FLOAT_TYPES[dtype],
            stream_of(codes.device),
        )
    return out


def ovp_decode_cuda(
    codes: Tensor, scale: Tensor, codebook: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`ovp_decode` on the GPU."""
    rows = schemas.check_decode(codes, scale, codebook, in_features, group_size, dtype)
    codes, scale, codebook = codes.contiguous(), scale.contiguous(), codebook.contiguous()
    return _decode(codes, scale, codebook, rows, in_features, group_size, dtype)


def ovp_pack_cuda(codes: Tensor, scale: Tensor, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """`ovp_pack` on the GPU, into the order of matrix fragments."""
    schemas.check_canonical(codes)
    rows = int(codes.shape[0])
    schemas.check_stored(codes, scale, None, rows, in_features, group_size)
    codes, scale = codes.contiguous(), scale.contiguous()
    size = (rows, in_features, group_size)
    packed_codes = torch.empty(CUDA_LAYOUT.codes_shape(*size), dtype=torch.uint8, device=codes.device)
    packed_scale = torch.empty(CUDA_LAYOUT.scale_shape(*size), dtype=torch.int16, device=codes.device)
    with on_device(codes.device):
        kernels().pack(
            codes.data_ptr(),
            scale.data_ptr(),
            rows,
            in_features,
            group_size,
            packed_codes.data_ptr(),
            packed_scale.data_ptr(),
            stream_of(codes.device),
        )
    return packed_codes, packed_scale


def ovp_unpack_cuda(
    codes: Tensor, scale: Tensor, out_features: int, in_features: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """`ovp_unpack` on the GPU."""
    schemas.check_packed(codes, CUDA_LAYOUT)
    schemas.check_stored(codes, scale, None, out_features, in_features, group_size, CUDA_LAYOUT)
    codes, scale = aligned(codes), aligned(scale)
    canonical_codes = torch.empty(
        codes_shape(out_features, in_features), dtype=torch.uint8, device=codes.device
    )
    canonical_scale = torch.empty(
        scale_shape(out_features, in_features, group_size), dtype=torch.int16, device=codes.device
    )
    with on_device(codes.device):
        kernels().unpack(
            codes.data_ptr(),
            scale.data_ptr(),
            out_features,
            in_features,
            group_size,
            canonical_codes.data_ptr(),
            canonical_scale.data_ptr(),
            stream_of(codes.device),
        )
    return canonical_codes, canonical_scale


def ovp_linear_cuda(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    plan: Plan | None = None,
) -> Tensor:
    """`ovp_linear` on the GPU; canonical codes are packed for the call. `plan` overrules `choose_linear`."""
    schemas.check_linear(input, codes, scale, codebook, bias, out_features, group_size, CUDA_LAYOUT)
    columns = int(input.shape[-1])
    if codes.dim() == 2:
        codes, scale = ovp_pack_cuda(codes, scale, columns, group_size)
    codes, scale, codebook = aligned(codes), aligned(scale), codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = input.numel() // columns
    if rows == 0:
        return input.new_empty((*input.shape[:-1], out_features))
    gpu = gpu_of(input.device)
    if plan is None:
        plan = choose_linear(rows, out_features, columns, input.dtype, gpu)
    if plan.kernel == "decode":
        weight = _decode(codes, scale, codebook, out_features, columns, group_size, input.dtype)
        return linear(input, weight, None if bias is None else bias.to(input.dtype))
    x = input.reshape(rows, columns)
    x = aligned(x if columns % 8 == 0 else pad(x, (0, -columns % 8)))  # rows of whole 16-byte loads
    out = torch.empty((*input.shape[:-1], out_features), dtype=input.dtype, device=input.device)
    arguments = (
        x.data_ptr(),
        FLOAT_TYPES[input.dtype],
        rows,
        out_features,
        int(x.shape[1]),
        group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        codebook.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        out.data_ptr(),
    )
    with on_device(input.device):
        if plan.kernel == "wgmma":
            kernels().linear_wgmma(*arguments, plan.rows, plan.tokens, stream_of(input.device))
            return out
        partial = None
        if plan.split > 1 and not gpu.clusters:
            shape = (plan.split, rows, out_features)
            partial = torch.empty(shape, dtype=torch.float32, device=input.device)
        address = 0 if partial is None else partial.data_ptr()
        kernels().linear_mma(*arguments, address, plan.tokens, plan.split, stream_of(input.device))
    return out
