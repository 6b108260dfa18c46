"""`CosineSchedule`: a number that changes over the steps of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """None before `first`, then along half a cosine from `start` to `end`, which it has from `last` on.

    Args:
        start, end: values.
        first, last: steps, first < last.

    Raises:
        ValueError: first is not below last.
    """

    start: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"first: expected at least 0 and below last={self.last}, got {self.first}")

    def __call__(self, step: int) -> float | None:
        """The value at a step, counted from 0."""
        if step < self.first:
            return None
        progress = min(1.0, (step - self.first) / (self.last - self.first))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
