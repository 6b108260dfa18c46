"""Random weights on uniform grids, and float64 oracles of what multiplies with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from olive.formats.uniform import pack_codes, uniform_scale_shape
from olive.ops.lsq import integer_range


class UniformCase(NamedTuple):
    """A weight [N, K] as stored, and as float64."""

    codes: Tensor  # packed
    scale: Tensor
    bits: int
    mid_rise: bool
    group_size: int
    levels: Tensor  # float64 [N, K]
    weight: Tensor  # float64 [N, K], scale times level

    def arguments(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        """What follows the input in a call, without that which quantizes it."""
        return (self.codes, self.scale, bias, self.bits, self.mid_rise, self.group_size)


NOT_QUANTIZED = (None, None, 8, True)


def uniform_case(
    rows: int, columns: int, bits: int, mid_rise: bool = True, group_size: int = -1, seed: int = 0
) -> UniformCase:
    """A weight that uses every code; scales within a factor of 4 of each other, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = 0.01 * torch.exp2(
        2 * torch.rand(uniform_scale_shape(rows, columns, group_size), generator=generator)
    )
    if rows > 2:
        scale[1, 0] = 0.0
    levels = codes.double() - (2**bits - 1) / 2 if mid_rise else codes.double() - 2 ** (bits - 1)
    width = columns if scale.shape[1] == 1 else group_size
    columns_scale = torch.stack([scale[:, k // width] for k in range(columns)], dim=1).double()
    return UniformCase(
        pack_codes(codes, bits), scale, bits, mid_rise, group_size, levels, levels * columns_scale
    )


def levels_of(x: Tensor, scale: Tensor, offset: Tensor | None, bits: int, signed: bool) -> Tensor:
    """q as float64, from the formula, value by value in float32."""
    qmin, qmax = integer_range(bits, signed)
    used = torch.maximum(scale, torch.tensor(1e-5))
    used = used if x.dim() == 1 else used[:, None]
    steps = (x.float() + (0.0 if offset is None else offset)) / used
    if signed and bits == 1:
        return torch.where(steps >= 0, 1.0, -1.0).double()
    return torch.round(steps).clamp(qmin, qmax).double()


def quantized_oracle(
    x: Tensor,
    case: UniformCase,
    bias: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    bits: int,
    signed: bool,
) -> Tensor:
    """float64 [..., N]: exact up to the last sums in float64."""
    q = levels_of(x, scale, offset, bits, signed)
    used = torch.maximum(scale, torch.tensor(1e-5)).double()
    out = (q @ case.weight.t()) * (used if x.dim() == 1 else used[:, None])
    return out if bias is None else out + bias.double()


def magnitude(x: Tensor, case: UniformCase, bias: Tensor | None) -> Tensor:
    """sum |x| |W| + |bias|, what rounding errors of a sum are measured by; of quantized x, x = s q."""
    total = x.double().abs() @ case.weight.abs().t()
    return total if bias is None else total + bias.double().abs()
