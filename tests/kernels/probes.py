"""Kernels that show what device helpers compute; imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

from olive.kernels.quantize_activations import chunk_sum


@triton.jit
def chunk_sum_kernel(
    values_ptr,  # float64 [ROWS, CHUNKS]
    sums_ptr,  # float64 [ROWS]
    chunks,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    values = tl.load(values_ptr + tl.arange(0, ROWS * CHUNKS))
    tl.store(sums_ptr + tl.arange(0, ROWS), chunk_sum(values, chunks, CHUNKS))
