"""Operators, as `torch.ops.olive.*`: importing this package registers schemas, reference and kernels."""

import torch

from olive.ops import (  # noqa: F401  (registers)
    autograd,
    compensate,
    cpu_quantized,
    cpu_training,
    cpu_uniform,
    reference,
    reference_quantized,
    schemas,
    schemas_quantized,
)
from olive.ops.cpu import cpu_backend  # registers
from olive.ops.float_activations import linear_float_activations  # registers
from olive.ops.gpu import gpu_backend, has_packed_layout  # registers
from olive.ops.lsq import lsq  # registers
from olive.ops.online_hadamard import block_hadamard, block_size  # registers
from olive.ops.oscillation import oscillation_  # registers
from olive.ops.statsq import statsq, statsq_codes, statsq_margin  # registers
from olive.ops.uniform import uniform_decode, uniform_linear  # registers

ovp_quantize = torch.ops.olive.ovp_quantize
ovp_encode = torch.ops.olive.ovp_encode
ovp_compensate = torch.ops.olive.ovp_compensate
ovp_decode = torch.ops.olive.ovp_decode
ovp_pack = torch.ops.olive.ovp_pack
ovp_unpack = torch.ops.olive.ovp_unpack
ovp_linear = torch.ops.olive.ovp_linear
quantize_activations = torch.ops.olive.quantize_activations
ovp_linear_quantized = torch.ops.olive.ovp_linear_quantized
ovp8_quantize = torch.ops.olive.ovp8_quantize
ovp8_decode = torch.ops.olive.ovp8_decode
ovp8_linear = torch.ops.olive.ovp8_linear

__all__ = [
    "block_hadamard",
    "block_size",
    "cpu_backend",
    "gpu_backend",
    "has_packed_layout",
    "linear_float_activations",
    "lsq",
    "oscillation_",
    "ovp8_decode",
    "ovp8_linear",
    "ovp8_quantize",
    "ovp_compensate",
    "ovp_decode",
    "ovp_encode",
    "ovp_linear",
    "ovp_linear_quantized",
    "ovp_pack",
    "ovp_quantize",
    "ovp_unpack",
    "quantize_activations",
    "statsq",
    "statsq_codes",
    "statsq_margin",
    "uniform_decode",
    "uniform_linear",
]
