"""Triton kernels of the operators, for tensors on a GPU.

Importing this package imports triton. The functions take arguments that the caller has checked: tensors of
one device, weights in the canonical layout (docs/format.md). They define no arithmetic of their own: they
give what the reference gives, bit for bit except for the order of sums in `ovp_linear_triton`.
"""

from olive.kernels.ovp_decode import ovp_decode_triton
from olive.kernels.ovp_encode import ovp_encode_triton
from olive.kernels.ovp_linear import ovp_linear_triton
from olive.kernels.ovp_quantize import ovp_quantize_triton

__all__ = ["ovp_decode_triton", "ovp_encode_triton", "ovp_linear_triton", "ovp_quantize_triton"]
