"""Shapes shared by every packed format: how a weight [N, K] is cut into groups that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

PER_CHANNEL = -1
PER_TENSOR = 0
GROUP_SIZES = (PER_CHANNEL, PER_TENSOR, 32, 64, 128)


def check_group_size(group_size: int, name: str = "group_size") -> int:
    """Return `group_size` if a kernel exists for it.

    Raises:
        TypeError: not an int.
        ValueError: none of -1 (per channel), 0 (per tensor), 32, 64, 128.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{name}: expected int, got {type(group_size).__name__}")
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"{name}: expected one of -1 (per channel), 0 (per tensor), 32, 64, 128, got {group_size}"
        )
    return group_size


def groups_per_row(in_features: int, group_size: int) -> int:
    """Number of scales in one row; the last group may be shorter than the others."""
    return 1 if group_size <= 0 else -(-in_features // group_size)


def codes_shape(out_features: int, in_features: int, bits: int = 4) -> tuple[int, int]:
    """Shape of the codes of a weight [N, K]: uint8 [N, ceil(K / 2)] for 4 bits, [N, 2 ceil(K / 2)] for 8."""
    pairs = (in_features + 1) // 2
    return (out_features, pairs if bits == 4 else 2 * pairs)


def scale_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]: [N, ceil(K / g)], [N, 1] per channel, [1, 1] per tensor."""
    return (1 if group_size == PER_TENSOR else out_features, groups_per_row(in_features, group_size))


def pad_columns(matrix: Tensor, multiple: int) -> Tensor:
    """Pad the last dimension with zeros to a multiple of `multiple`; the input itself when none is needed."""
    missing = -matrix.shape[-1] % multiple
    return matrix if missing == 0 else torch.nn.functional.pad(matrix, (0, missing))


def expand_scale(scale: Tensor, out_features: int, in_features: int, group_size: int) -> Tensor:
    """Repeat one value per group to one value per column.

    Args:
        scale: any dtype, shape `scale_shape(N, K, group_size)`.

    Returns:
        Same dtype, [N, 2 ceil(K / 2)]: the pad column of an odd K belongs to the last group.
    """
    columns = in_features + in_features % 2
    if group_size <= 0:
        return scale.expand(out_features, columns)
    return scale.repeat_interleave(group_size, dim=1)[:, :columns]
