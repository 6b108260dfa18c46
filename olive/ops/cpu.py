"""CPU backend: registers the C++ kernels of `olive._cpu` where the module was built."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from olive.formats.layout import codes_shape, scale_shape
from olive.ops import schemas
from olive.ops.native import FLOAT_TYPES
from olive.ops.packed import CPU_LAYOUT
from olive.ops.schemas import library

_LOG = logging.getLogger("olive")


def _load() -> ModuleType | None:
    # After torch: the module's OpenMP symbols are those of the runtime that torch has loaded.
    try:
        module = importlib.import_module("olive._cpu")
    except ImportError as error:
        _LOG.warning(
            "olive._cpu: expected a compiled module, got ImportError (%s); using the slow reference "
            "operators. Build it with `pip install .`",
            error,
        )
        return None
    return module


_MODULE = _load()


def cpu_backend() -> str:
    """Name of the instruction set the CPU kernels use, or "reference" where they were not built."""
    return "reference" if _MODULE is None else str(_MODULE.default_isa())


def cpu_isas() -> list[str]:
    """Instruction sets that can run here, slowest first; empty where the kernels were not built."""
    return [] if _MODULE is None else list(_MODULE.supported_isas())


def has_cpu_kernels() -> bool:
    """Whether the module was built."""
    return _MODULE is not None


def cpu_kernels() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it was not built.
    """
    if _MODULE is None:
        raise RuntimeError("olive._cpu: expected a compiled module, got none; build it with `pip install .`")
    # torch.set_num_threads reaches a new Python thread only once torch is asked there (30 ns).
    torch.get_num_threads()
    return _MODULE


def ovp_quantize_cpu(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """`ovp_quantize` on the CPU kernels; `isa` names an instruction set, "" the best one."""
    rows, columns = schemas.check_quantize(
        weight, codebook, group_size, pairing, pair_grid, plain_grid, importance
    )
    schemas.check_values(codebook, pair_grid, importance)
    weight, codebook = weight.contiguous(), codebook.contiguous()
    importance = None if importance is None else importance.contiguous()
    codes = torch.empty(codes_shape(rows, columns), dtype=torch.uint8, device="cpu")
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device="cpu")
    finite = cpu_kernels().quantize(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        rows,
        columns,
        group_size,
        codebook.data_ptr(),
        pairing == "paper",
        pair_grid,
        plain_grid,
        0 if importance is None else importance.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        isa,
    )
    if not finite:
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return codes, scale


def ovp_encode_cpu(
    weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: str, isa: str = ""
) -> Tensor:
    """`ovp_encode` on the CPU kernels."""
    rows, columns = schemas.check_encode(weight, scale, codebook, group_size, pairing)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    weight, scale, codebook = weight.contiguous(), scale.contiguous(), codebook.contiguous()
    codes = torch.empty(codes_shape(rows, columns), dtype=torch.uint8, device="cpu")
    cpu_kernels().encode(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        rows,
        columns,
        group_size,
        codebook.data_ptr(),
        pairing == "paper",
        scale.data_ptr(),
        codes.data_ptr(),
        isa,
    )
    return codes


def ovp_decode_cpu(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:
    """`ovp_decode` on the CPU kernels."""
    rows = schemas.check_decode(codes, scale, codebook, in_features, group_size, dtype)
    codes, scale, codebook = codes.contiguous(), scale.contiguous(), codebook.contiguous()
    out = torch.empty((rows, in_features), dtype=dtype, device="cpu")
    cpu_kernels().decode(
        codes.data_ptr(),
        scale.data_ptr(),
        codebook.data_ptr(),
        rows,
        in_features,
        group_size,
        out.data_ptr(),
        FLOAT_TYPES[dtype],
        isa,
    )
    return out


def ovp_pack_cpu(codes: Tensor, scale: Tensor, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """`ovp_pack` on the CPU kernels; asks the system for huge pages."""
    schemas.check_canonical(codes)
    rows = int(codes.shape[0])
    schemas.check_stored(codes, scale, None, rows, in_features, group_size)
    codes, scale = codes.contiguous(), scale.contiguous()
    size = (rows, in_features, group_size)
    packed_codes = torch.empty(CPU_LAYOUT.codes_shape(*size), dtype=torch.uint8, device="cpu")
    packed_scale = torch.empty(CPU_LAYOUT.scale_shape(*size), dtype=torch.int16, device="cpu")
    cpu_kernels().pack(
        codes.data_ptr(),
        scale.data_ptr(),
        rows,
        in_features,
        group_size,
        packed_codes.data_ptr(),
        packed_scale.data_ptr(),
    )
    return packed_codes, packed_scale


def ovp_unpack_cpu(
    codes: Tensor, scale: Tensor, out_features: int, in_features: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """`ovp_unpack` on the CPU kernels."""
    schemas.check_packed(codes)
    schemas.check_stored(codes, scale, None, out_features, in_features, group_size)
    codes, scale = codes.contiguous(), scale.contiguous()
    canonical_codes = torch.empty(codes_shape(out_features, in_features), dtype=torch.uint8, device="cpu")
    canonical_scale = torch.empty(
        scale_shape(out_features, in_features, group_size), dtype=torch.int16, device="cpu"
    )
    cpu_kernels().unpack(
        codes.data_ptr(),
        scale.data_ptr(),
        out_features,
        in_features,
        group_size,
        canonical_codes.data_ptr(),
        canonical_scale.data_ptr(),
    )
    return canonical_codes, canonical_scale


def ovp_linear_cpu(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    isa: str = "",
) -> Tensor:
    """`ovp_linear` on the CPU kernels; canonical codes are packed for the call."""
    schemas.check_linear(input, codes, scale, codebook, bias, out_features, group_size)
    columns = int(input.shape[-1])
    if codes.dim() == 2:
        codes, scale = ovp_pack_cpu(codes, scale, columns, group_size)
    input, codes, scale = input.contiguous(), codes.contiguous(), scale.contiguous()
    codebook = codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((*input.shape[:-1], out_features), dtype=input.dtype, device="cpu")
    cpu_kernels().linear(
        input.data_ptr(),
        FLOAT_TYPES[input.dtype],
        input.numel() // columns,
        out_features,
        columns,
        group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        codebook.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        out.data_ptr(),
        isa,
    )
    return out


if _MODULE is not None:
    for _name, _function in (
        ("ovp_quantize", ovp_quantize_cpu),
        ("ovp_encode", ovp_encode_cpu),
        ("ovp_decode", ovp_decode_cpu),
        ("ovp_pack", ovp_pack_cpu),
        ("ovp_unpack", ovp_unpack_cpu),
        ("ovp_linear", ovp_linear_cpu),
    ):
        library.impl(_name, _function, "CPU")
