"""Triton kernels of the operators, for tensors on a GPU.

Importing this package imports triton. The functions take arguments that the caller has checked: tensors of
one device, weights in the canonical layout (docs/format.md). They define no arithmetic of their own: they
give what the reference gives, bit for bit except for the order of sums in `ovp_linear_triton`,
`ovp8_linear_triton`, `lsq_backward_triton` (scales) and, where the columns are split,
`ovp_linear_quantized_triton`; sums of `statsq_triton` are of float64, where the order hardly ever shows.
"""

from olive.kernels.lsq import lsq_backward_triton, lsq_triton
from olive.kernels.oscillation import oscillation_triton_
from olive.kernels.ovp8_decode import ovp8_decode_triton
from olive.kernels.ovp8_linear import ovp8_linear_triton
from olive.kernels.ovp8_quantize import ovp8_quantize_triton
from olive.kernels.ovp_decode import ovp_decode_triton
from olive.kernels.ovp_encode import ovp_encode_triton
from olive.kernels.ovp_linear import ovp_linear_triton
from olive.kernels.ovp_linear_quantized import ovp_linear_quantized_triton
from olive.kernels.ovp_quantize import ovp_quantize_triton
from olive.kernels.quantize_activations import quantize_activations_triton
from olive.kernels.statsq import statsq_codes_triton, statsq_margin_triton, statsq_triton
from olive.kernels.uniform_linear import uniform_linear_triton

__all__ = [
    "lsq_backward_triton",
    "lsq_triton",
    "oscillation_triton_",
    "ovp8_decode_triton",
    "ovp8_linear_triton",
    "ovp8_quantize_triton",
    "ovp_decode_triton",
    "ovp_encode_triton",
    "ovp_linear_quantized_triton",
    "ovp_linear_triton",
    "ovp_quantize_triton",
    "quantize_activations_triton",
    "statsq_codes_triton",
    "statsq_margin_triton",
    "statsq_triton",
    "uniform_linear_triton",
]
