"""Operators, as `torch.ops.olive.*`: importing this package registers schemas, reference and kernels."""

import torch

from olive.ops import autograd, reference, schemas  # noqa: F401  (registers)
from olive.ops.cpu import cpu_backend  # registers
from olive.ops.gpu import gpu_backend, has_packed_layout  # registers

ovp_quantize = torch.ops.olive.ovp_quantize
ovp_encode = torch.ops.olive.ovp_encode
ovp_decode = torch.ops.olive.ovp_decode
ovp_pack = torch.ops.olive.ovp_pack
ovp_unpack = torch.ops.olive.ovp_unpack
ovp_linear = torch.ops.olive.ovp_linear

__all__ = [
    "cpu_backend",
    "gpu_backend",
    "has_packed_layout",
    "ovp_decode",
    "ovp_encode",
    "ovp_linear",
    "ovp_pack",
    "ovp_quantize",
    "ovp_unpack",
]
