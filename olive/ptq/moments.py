"""Second moments of a layer's inputs: what an error in a column of its weight costs the output.

With inputs x the squared error of an output is (w - q)^T H (w - q), H the sum of x x^T. GPTQ needs H itself;
a search that decides every value on its own needs the diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment(ABC):
    """A sum over rows of inputs.

    Args:
        total: the sum; None before the first row.
        seen: how many rows there were.
    """

    total: Tensor | None = None
    seen: int = 0

    @abstractmethod
    def _plus(self, rows: Tensor) -> Tensor: ...

    def updated(self, rows: Tensor) -> Self:
        """With more rows [T, K] added."""
        return replace(self, total=self._plus(rows.detach()), seen=self.seen + len(rows))

    @abstractmethod
    def energy(self) -> Tensor:
        """Sum of squares of each column, float64 [K]; there has to be a row."""


# Rows of inputs per column that GPTQ takes: with fewer, it makes up for errors on the sample, not on the
# data.
LEAST_ROWS = 0.25
# Of the mean, added to every column: one that the data left at zero must not be rounded at random.
FLOOR = 0.01


def relative(energy: Tensor) -> Tensor | None:
    """What errors in each column cost, float32 [K], the largest 1; None if every input was zero."""
    energy = energy + FLOOR * energy.mean()
    largest = energy.max()
    return (energy / largest).float() if bool(largest > 0) else None


class ColumnMoment(Moment):
    """Sum of squares of each column: float64 [K]."""

    def _plus(self, rows: Tensor) -> Tensor:
        energy = rows.float().square().sum(0, dtype=torch.float64)
        return energy if self.total is None else self.total + energy

    def energy(self) -> Tensor:
        assert self.total is not None
        return self.total


def _on_tensor_cores(rows: Tensor) -> bool:
    """Whether factors are multiplied in 16 bits, as they come: products of two such are exact in float32.

    (Differences from the float model are rounded to 16 bits for that.)
    """
    halves = (torch.bfloat16, torch.float16)
    return rows.is_cuda and torch.version.hip is None and rows.dtype in halves


def _with_products(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left^T right of [T, K] each, summed in float32."""
    if _on_tensor_cores(right):
        products = torch.mm(left.to(right.dtype).T, right, out_dtype=torch.float32)
        return products if total is None else total + products
    left, right = left.float(), right.float()
    return left.T @ right if total is None else torch.addmm(total, left.T, right)


@dataclass(frozen=True)
class Drift:
    """How far inputs x are from z, what the float model has in their place.

    Args:
        products: sum of (z - x) x^T, float32 [K, K].
        energy: sum of |z - x|^2.
        rows: how many there were.
    """

    products: Tensor
    energy: float
    rows: int


@dataclass(frozen=True)
class SecondMoment(Moment):
    """H, the sum of x x^T: float32 [K, K], on the inputs' device.

    Args:
        drift: of the inputs; None = nobody looked.
    """

    drift: Drift | None = None

    def _plus(self, rows: Tensor) -> Tensor:
        return _with_products(self.total, rows, rows)

    def updated_beside(self, rows: Tensor, floats: Tensor) -> SecondMoment:
        """With more rows [T, K], and what the float model has in their place."""
        rows, known = rows.detach(), self.drift
        away = floats.detach().float() - rows.float()
        drift = Drift(
            _with_products(None if known is None else known.products, away, rows),
            float(away.square().sum(dtype=torch.float64)) + (0.0 if known is None else known.energy),
            len(rows) + (0 if known is None else known.rows),
        )
        return SecondMoment(self._plus(rows), self.seen + len(rows), drift)

    def energy(self) -> Tensor:
        assert self.total is not None
        return self.total.diagonal().double()

    def can_compensate(self) -> bool:
        """Whether there are enough rows, and any input that is not zero."""
        if self.total is None or self.seen < LEAST_ROWS * len(self.total):
            return False
        return bool(self.total.diagonal().any())
