"""How far a quantized weight is from the float one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olive import ops
from olive.formats import PER_TENSOR

# Decoded at a time: what fits a CPU's caches; a GPU is waited for each time.
_CHUNK_VALUES = {"cpu": 1 << 20}
_LARGE_CHUNK_VALUES = 1 << 26


def decode(
    codes: Tensor, scale: Tensor, codebook: Tensor | None, in_features: int, group_size: int
) -> Tensor:
    """A stored weight as float32 [N, K]; no codebook means 8 bits."""
    if codebook is None:
        decoded: Tensor = ops.ovp8_decode(codes, scale, in_features, group_size, torch.float32)
    else:
        decoded = ops.ovp_decode(codes, scale, codebook, in_features, group_size, torch.float32)
    return decoded


def energies(
    weight: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor | None, group_size: int
) -> tuple[float, float]:
    """Sums of w^2 and of (w - decoded w)^2 over a weight [N, K] and its stored tensors."""
    rows, columns = weight.shape
    step = max(1, _CHUNK_VALUES.get(weight.device.type, _LARGE_CHUNK_VALUES) // columns)
    signal = noise = 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        part_scale = scale if group_size == PER_TENSOR else scale[start : start + step]
        signal += _energy(part)
        noise += _energy(
            part - decode(codes[start : start + step], part_scale, codebook, columns, group_size)
        )
    return signal, noise


def _energy(values: Tensor) -> float:
    """Sum of squares of [rows, columns]: rows in float32, 1e-6 off at most, added up in float64."""
    energy = float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
    if not 1e-20 < energy < 1e20:  # float32 squares of such values may have overflowed or vanished
        energy = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return energy


def column_energies(weight: Tensor) -> Tensor:
    """Sums of squares of the columns of a weight [..., N, K], stacks added up: float32 [K]."""
    return weight.float().square().flatten(0, -2).sum(0)


def decibels(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
