"""Which backend serves a GPU: CUDA kernels, Triton kernels, or the reference. Registers the choice.

`OLIVE_GPU_BACKEND` (cuda, triton or reference) names one; if it cannot serve the GPU that is an error. Else
the first that can is taken, and a second choice is logged once with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from olive.ops import (
    compensate,
    cuda,
    cuda_compensate,
    cuda_quantized,
    reference,
    reference_quantized,
    triton,
    triton_quantized,
    triton_training,
    triton_uniform,
    uniform,
)
from olive.ops.lsq import lsq_backward_reference, lsq_reference
from olive.ops.oscillation import oscillation_reference_
from olive.ops.schemas import library
from olive.ops.statsq import statsq_codes_reference, statsq_margin_reference, statsq_reference

VARIABLE = "OLIVE_GPU_BACKEND"
GPU_TYPES = ("cuda", "xpu")  # PyTorch calls AMD's GPUs cuda as well
_LOG = logging.getLogger("olive")

_Functions = dict[str, Callable[..., Any]]
_REFERENCE: _Functions = {
    "ovp_quantize": reference.ovp_quantize_reference,
    "ovp_encode": reference.ovp_encode_reference,
    "ovp_compensate": compensate.ovp_compensate_reference,
    "ovp_decode": reference.ovp_decode_reference,
    "ovp_pack": reference.ovp_pack_reference,
    "ovp_unpack": reference.ovp_unpack_reference,
    "ovp_linear": reference.ovp_linear_reference,
    "quantize_activations": reference_quantized.quantize_activations_reference,
    "ovp_linear_quantized": reference_quantized.ovp_linear_quantized_reference,
    "ovp8_quantize": reference_quantized.ovp8_quantize_reference,
    "ovp8_decode": reference_quantized.ovp8_decode_reference,
    "ovp8_linear": reference_quantized.ovp8_linear_reference,
    "statsq": statsq_reference,
    "statsq_codes": statsq_codes_reference,
    "statsq_margin": statsq_margin_reference,
    "lsq": lsq_reference,
    "lsq_backward": lsq_backward_reference,
    "oscillation_": oscillation_reference_,
    "uniform_linear": uniform.uniform_linear_reference,
}
_TRITON: _Functions = {
    **_REFERENCE,
    "ovp_quantize": triton.ovp_quantize_triton,
    "ovp_encode": triton.ovp_encode_triton,
    "ovp_decode": triton.ovp_decode_triton,
    "ovp_linear": triton.ovp_linear_triton,
    "quantize_activations": triton_quantized.quantize_activations_triton,
    "ovp_linear_quantized": triton_quantized.ovp_linear_quantized_triton,
    "ovp8_quantize": triton_quantized.ovp8_quantize_triton,
    "ovp8_decode": triton_quantized.ovp8_decode_triton,
    "ovp8_linear": triton_quantized.ovp8_linear_triton,
    "statsq": triton_training.statsq_triton,
    "statsq_codes": triton_training.statsq_codes_triton,
    "statsq_margin": triton_training.statsq_margin_triton,
    "lsq": triton_training.lsq_triton,
    "lsq_backward": triton_training.lsq_backward_triton,
    "oscillation_": triton_training.oscillation_triton_,
    "uniform_linear": triton_uniform.uniform_linear_triton,
}


def _device_of(arguments: tuple[Any, ...]) -> torch.device:
    return next(argument.device for argument in arguments if isinstance(argument, Tensor))


def _without_cuda(name: str) -> Callable[..., Any]:
    """An operator that `olive._cuda` has no kernel for: Triton's where it can serve, else the reference."""

    def run(*arguments: Any) -> Any:
        functions = _REFERENCE if triton.missing(_device_of(arguments)) else _TRITON
        return functions[name](*arguments)

    return run


_BACKENDS: dict[str, _Functions] = {
    "cuda": {
        "ovp_quantize": cuda.ovp_quantize_cuda,
        "ovp_encode": cuda.ovp_encode_cuda,
        "ovp_compensate": cuda_compensate.ovp_compensate_cuda,
        "ovp_decode": cuda.ovp_decode_cuda,
        "ovp_pack": cuda.ovp_pack_cuda,
        "ovp_unpack": cuda.ovp_unpack_cuda,
        "ovp_linear": cuda.ovp_linear_cuda,
        "quantize_activations": cuda_quantized.quantize_activations_cuda,
        "ovp_linear_quantized": cuda_quantized.ovp_linear_quantized_cuda,
        "ovp8_quantize": _without_cuda("ovp8_quantize"),
        "ovp8_decode": _without_cuda("ovp8_decode"),
        "ovp8_linear": _without_cuda("ovp8_linear"),
        "statsq": _without_cuda("statsq"),
        "statsq_codes": _without_cuda("statsq_codes"),
        "statsq_margin": _without_cuda("statsq_margin"),
        "lsq": _without_cuda("lsq"),
        "lsq_backward": _without_cuda("lsq_backward"),
        "oscillation_": _without_cuda("oscillation_"),
        "uniform_linear": _without_cuda("uniform_linear"),
    },
    "triton": _TRITON,
    "reference": _REFERENCE,
}


def _missing(backend: str, device: torch.device) -> str:
    """Why a backend cannot serve a device, in words; "" if it can."""
    if backend == "cuda":
        return cuda.missing(device) if device.type == "cuda" else "olive._cuda is for NVIDIA GPUs"
    return triton.missing(device) if backend == "triton" else ""


@lru_cache
def gpu_backend(device: torch.device) -> str:
    """Name of the backend that serves a GPU: "cuda", "triton" or "reference".

    Raises:
        ValueError: OLIVE_GPU_BACKEND names no backend.
        RuntimeError: it names one that cannot serve this GPU.
    """
    named = os.environ.get(VARIABLE, "")
    if named:
        if named not in _BACKENDS:
            raise ValueError(f"{VARIABLE}: expected one of {', '.join(_BACKENDS)}, got {named!r}")
        if reason := _missing(named, device):
            raise RuntimeError(
                f"{VARIABLE}: expected a backend that can serve {device}, got {named!r}: {reason}; "
                f"unset {VARIABLE} to choose automatically"
            )
        return named
    reasons: list[str] = []
    for backend in _BACKENDS:
        reason = _missing(backend, device)
        if not reason:
            if reasons:
                _LOG.warning("%s: using the %s kernels, because %s", device, backend, "; ".join(reasons))
            return backend
        reasons.append(reason)
    raise AssertionError("the reference serves every device")


def has_packed_layout(device: torch.device) -> bool:
    """Whether weights on this device are kept in a packed layout."""
    if device.type == "cpu":
        return True
    return device.type == "cuda" and gpu_backend(device) == "cuda"


def _chosen(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return _BACKENDS[gpu_backend(_device_of(arguments))][name](*arguments)

    return run


for _name in _REFERENCE:
    for _type in GPU_TYPES:
        library.impl(_name, _chosen(_name), _type.upper())
