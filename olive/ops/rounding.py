"""Roundings that PyTorch has no operation for."""

from __future__ import annotations

import torch
from torch import Tensor


def divided(tensor: Tensor, divisor: float) -> Tensor:
    """tensor / divisor, rounded once: on a GPU PyTorch multiplies by the reciprocal of a number."""
    return tensor / torch.full((), divisor, dtype=tensor.dtype, device=tensor.device)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c for float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there (of the two neighbours of the exact sum,
    the one whose last bit is set), so that rounding it again to float32, 29 bits shorter, gives what one
    rounding would.
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)  # the exact rest (Knuth's two-sum)
    is_even = (total.contiguous().view(torch.int64) & 1) == 0
    towards = torch.where(lost > 0, torch.inf, -torch.inf).double()
    odd = torch.nextafter(total, towards)
    return torch.where(torch.isfinite(total) & (lost != 0) & is_even, odd, total).float()
