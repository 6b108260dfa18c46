"""y = x W^T + bias with W in 8-bit outlier-victim pairs: the kernels of `ovp_linear`, which decode either.

Every level, an int8 or at most 2^15 with four significant bits, is exact in both 16-bit types. With few rows
this is bound by decoding, at about three quarters of the memory speed of an H100 (`decode_pairs8`).
"""

from __future__ import annotations

from torch import Tensor

from olive.kernels.launch import pairs_of
from olive.kernels.ovp_linear import linear


def ovp8_linear_triton(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """y = x W^T + bias with float32 sums, rounded once to x's type.

    No synchronisation and no tuning at run time, so it can be captured in a CUDA graph.

    Args:
        input: float32, bfloat16 or float16 [..., K]; any strides.
        codes: uint8 [N, 2 ceil(K / 2)].
        scale: int16, `scale_shape(N, K, group_size)`.
        bias: float [N] or None.
        out_features: N.
        group_size: -1 per channel, 0 per tensor, else columns per group.

    Returns:
        input's dtype, [..., N].
    """
    return linear(input, pairs_of(codes), scale, None, bias, out_features, group_size)
