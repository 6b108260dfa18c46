"""`ovp_linear` of the CPU kernels, step by step in plain PyTorch: the oracle that they equal bit for bit.

The arithmetic (csrc/cpu/activations.inl, linear_common.inl): activations become integers per row and block of
columns, integer products are summed exactly, and blocks are added with one float32 fused multiply-add each,
first to last. Nothing here shares code with the kernels or knows their layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.ops.rounding import fused_multiply_add

SMALLEST = 2.0**-105  # blocks below it count as zero: their scale would be subnormal


def scale_values(scale: Tensor) -> Tensor:
    """Stored scales (int16) as float32, the rule bit cleared."""
    return ((scale.int() & 0xFFFE) << 16).view(torch.float32)


def weight_levels(codes: Tensor, scale: Tensor, codebook: Tensor, columns: int, group_size: int) -> Tensor:
    """Integer levels int64 [N, K] of canonical codes, decoded nibble by nibble."""
    magnitudes = codebook[:16].view(torch.uint8).long()
    signs = torch.tensor([1, -1]).repeat_interleave(8)
    normal, outlier = magnitudes[:8].repeat(2) * signs, magnitudes[8:].repeat(2) * signs
    low, high = (codes & 15).long(), (codes >> 4).long()
    even = torch.where(high == 8, outlier[low], normal[low])
    odd = torch.where(low == 8, outlier[high], normal[high])
    paired = torch.stack((even, odd), dim=-1).flatten(1)[:, :columns]
    plain = codebook[16:].long()[torch.stack((low, high), dim=-1).flatten(1)[:, :columns]]
    group = torch.zeros(columns, dtype=torch.long) if group_size <= 0 else torch.arange(columns) // group_size
    rule = (scale & 1).bool().expand(codes.shape[0], -1)[:, group]
    return torch.where(rule, plain, paired)


def to_fixed_point(block: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One block of every row, float32 [M, columns], as integers and a power of two: block ~ q * scale.

    Returns:
        q int64 [M, columns], |q| <= 2^(bits + 1); scale float32 [M], NaN where a value is not finite.
    """
    finite = torch.isfinite(block).all(dim=1)
    largest = torch.where(finite, block.abs().amax(dim=1), 0.0)
    used = largest >= SMALLEST
    exponent = torch.frexp(torch.where(used, largest, 1.0)).exponent - 1  # 2^exponent <= largest
    clean = torch.where((finite & used)[:, None], block, 0.0).double()
    q = torch.round(torch.ldexp(clean, (bits - exponent)[:, None])).long()  # to the nearest, ties to even
    scale = torch.ldexp(torch.ones(len(block), dtype=torch.float64), exponent - bits).float()
    scale = torch.where(used, scale, 0.0)
    return q, torch.where(finite, scale, torch.nan)


def ovp_linear_fixed_point(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """What every instruction set computes for canonical `codes`; arguments and result as in `ovp_linear`."""
    columns, outputs = input.shape[-1], codes.shape[0]
    x = input.reshape(-1, columns).float()
    levels = weight_levels(codes, scale, codebook, columns, group_size)
    wide = input.dtype == torch.float32
    width = 128 if group_size <= 0 else group_size
    total = torch.zeros(len(x), outputs)
    for index, first in enumerate(range(0, columns, width)):
        q, scale_x = to_fixed_point(x[:, first : first + width], 21 if wide else 13)
        w = levels[:, first : first + width].T
        if wide:
            high = (q + 128) >> 8
            products = fused_multiply_add(
                (high @ w).float(), torch.tensor(256.0), ((q - (high << 8)) @ w).float()
            )
        else:
            products = (q @ w).float()
        stored = scale[:, 0] if group_size <= 0 else scale[:, index]
        scale_w = scale_values(stored).expand(outputs)
        total = fused_multiply_add(products, scale_w * scale_x[:, None], total)
    if bias is not None:
        total = total + bias.float()
    return total.to(input.dtype).reshape(*input.shape[:-1], outputs)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits; any NaN equals any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    as_bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = actual.contiguous().view(as_bits) == expected.contiguous().view(as_bits)
    same |= torch.isnan(actual) & torch.isnan(expected)
    wrong = torch.nonzero(~same)
    assert len(wrong) == 0, (
        f"{len(wrong)} of {same.numel()} values differ, first at {wrong[0].tolist()}: "
        f"{actual[tuple(wrong[0])].item()!r} instead of {expected[tuple(wrong[0])].item()!r}"
    )
