"""Inputs of the tests of quantized activations."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats import pack_scale
from tests.ops.cpu_cases import BOOKS, heavy_tailed

INT8_BOOKS = [name for name in BOOKS if name != "flint4"]
STATIC = 0.07  # in the units of `activations`: some values are outliers, some are clipped


def activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Mixed signs and an outlier column; from 3 rows on zeros, tiny values, and rows with NaN and Inf."""
    x = (5 * heavy_tailed(rows, columns)).clone()
    x[:, columns // 3] *= 60
    if rows > 2:
        x[1] = 0
        x[2] *= 1e-22  # zeros in float16
    if rows > 4:
        x[3, columns // 2], x[4, -1] = float("nan"), float("-inf")
    return x.to(dtype)


def static_scale(value: float = STATIC, plain: bool = False) -> Tensor:
    """A stored scale: int16 [1]."""
    return pack_scale(torch.tensor([value]), torch.tensor([plain]))


def how(
    format: str, group_size: int, pairing: str = "optimal", book: str = "adaptive"
) -> tuple[str, int, str, Tensor | None, Tensor | None]:
    """Arguments of `quantize_activations` between the input and the levels' type."""
    table = BOOKS[book].tensor() if format == "ovp4" else None
    return format, group_size, pairing, table, static_scale() if group_size == 0 else None
