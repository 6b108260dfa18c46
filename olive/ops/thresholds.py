"""Codes and distances on a grid whose thresholds are the whole numbers qmin + 1 .. qmax."""

from __future__ import annotations

from torch import Tensor


def code_of(position: Tensor, qmin: int, qmax: int) -> Tensor:
    """The code k whose cell [k, k + 1) holds a position, -inf and inf ending the first and the last cell.

    Args:
        position: float32, in steps. NaN counts as 0.
        qmin, qmax: the first and the last code.

    Returns:
        float32 of the position's shape, whole numbers.
    """
    return position.floor().nan_to_num(0.0, float("inf"), float("-inf")).clamp(qmin, qmax)


def from_threshold(position: Tensor, qmin: int, qmax: int) -> Tensor:
    """Steps from the nearest threshold, below it negative: float32; of NaN it is NaN."""
    return position - position.round().clamp(qmin + 1, qmax)


def threshold_distance(position: Tensor, qmin: int, qmax: int) -> Tensor:
    """Steps to the nearest threshold: float32, at least 0; of NaN it is NaN."""
    return from_threshold(position, qmin, qmax).abs()
