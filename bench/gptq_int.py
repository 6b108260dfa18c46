"""GPTQ with asymmetric integers, the method that 4-bit checkpoints are usually made with: the one to compare
with.

Written from the paper (arXiv:2210.17323) and the conventions of its users: round to nearest on a grid from
the smallest to the largest value of each group, found when the group is reached; damping 0.01 of the mean of
the diagonal; blocks of 128 columns; float16 scales and zero points of as many bits. Nothing of it is
shared with `olive.ptq.gptq`. Where gptqmodel is installed, `bench.peers_quality` calls that as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines import Decoded


def _grid(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, 1] of a group [N, g]."""
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    scale = ((high - low) / levels).half().float()
    return scale, torch.round(-low / scale).clamp(0, levels)


def gptq_int(
    weight: Tensor,
    second_moment: Tensor,
    group_size: int,
    *,
    bits: int = 4,
    damping: float = 0.01,
    activation_order: bool = False,
) -> Decoded:
    """Quantize and decode.

    Args:
        weight: float32 [N, K].
        second_moment: float32 [K, K], sum of x x^T over the layer's inputs.
        group_size: columns per group.
        bits: per weight.
        damping: added to the diagonal, in units of its mean.
        activation_order: columns with the largest inputs first. Groups stay runs of neighbouring columns, so
            that nothing more is stored, and get their grids before any error is made up for ("static
            groups").
    """
    levels = 2**bits - 1
    values, h = weight.double().clone(), second_moment.double().clone()
    rows, columns = values.shape
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    values[:, dead] = 0.0
    order = h.diagonal().argsort(descending=True, stable=True) if activation_order else torch.arange(columns)
    static = (
        [_grid(part.float(), levels) for part in values.split(group_size, dim=1)] if activation_order else []
    )
    values, h = values[:, order], h[order][:, order]
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    decoded = torch.zeros_like(values)
    scale = zero = torch.empty(0)
    for column in range(columns):
        if static:
            scale, zero = static[int(order[column]) // group_size]
        elif column % group_size == 0:
            scale, zero = _grid(values[:, column : column + group_size].float(), levels)
        now = values[:, column, None]
        code = torch.clamp(torch.round(now / scale) + zero, 0, levels)
        decoded[:, column] = (scale * (code - zero))[:, 0]
        error = (values[:, column] - decoded[:, column]) / upper[column, column]
        values[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    groups = -(-columns // group_size)
    natural = torch.empty_like(decoded)
    natural[:, order] = decoded
    return Decoded(natural.float(), bits + rows * groups * (16 + bits) / weight.numel())
