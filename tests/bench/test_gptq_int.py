"""GPTQ with integers, the baseline: against a slow form of the method, and its two orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.baselines import int4_asymmetric
from bench.gptq_int import gptq_int


def layer(rows: int = 12, columns: int = 64) -> tuple[Tensor, Tensor]:
    """A weight and a second moment of correlated inputs with a few large columns."""
    mixed = torch.randn(400, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    mixed[:, ::7] *= 4
    return torch.randn(rows, columns), mixed.T @ mixed


def loss(weight: Tensor, decoded: Tensor, moment: Tensor) -> float:
    error = (decoded - weight).double()
    return float(((error @ moment.double()) * error).sum())


def grid(values: Tensor) -> tuple[float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = float(torch.tensor((high - low) / 15).half())
    return scale, float(round(-low / scale))


@pytest.mark.parametrize("activation_order", [False, True])
def test_columns_that_are_left_make_up_for_each_error(activation_order: bool) -> None:
    # The method before its shortcuts (Optimal Brain Surgeon): after each column the inverse of what is left
    # of H is computed anew.
    weight, moment = layer(3, 16)
    size = 8
    h = moment.double() + 0.01 * moment.diagonal().double().mean() * torch.eye(16)
    order = moment.diagonal().argsort(descending=True).tolist() if activation_order else list(range(16))
    expected = torch.zeros(3, 16, dtype=torch.float64)
    for row in range(3):
        values = weight[row].double().clone()
        grids = [grid(weight[row, start : start + size]) for start in (0, 8)]
        for place, column in enumerate(order):
            if not activation_order and column % size == 0:
                grids[column // size] = grid(values[column : column + size].float())
            scale, zero = grids[column // size]
            code = min(max(round(float(values[column]) / scale) + zero, 0), 15)
            expected[row, column] = (code - zero) * scale
            left = order[place:]
            inverse = torch.linalg.inv(h[left][:, left])
            values[left] -= (values[column] - expected[row, column]) / inverse[0, 0] * inverse[0]
    decoded, bits = gptq_int(weight, moment, size, activation_order=activation_order)
    torch.testing.assert_close(decoded, expected.float(), rtol=1e-5, atol=1e-6)
    assert bits == 4 + 3 * 2 * 20 / 48


def test_output_error_falls() -> None:
    weight, moment = layer()
    plain, natural, ordered = (
        loss(weight, decoded.weight, moment)
        for decoded in (
            int4_asymmetric(weight, 32),
            gptq_int(weight, moment, 32),
            gptq_int(weight, moment, 32, activation_order=True),
        )
    )
    assert natural < 0.8 * plain
    assert ordered < natural


@pytest.mark.parametrize("activation_order", [False, True])
def test_without_correlation_it_rounds_to_nearest(activation_order: bool) -> None:
    weight, moment = torch.randn(5, 40), torch.diag(torch.rand(40) + 0.5)
    decoded = gptq_int(weight, moment, 16, activation_order=activation_order).weight
    torch.testing.assert_close(decoded, int4_asymmetric(weight, 16).weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation_order", [False, True])
def test_columns_without_input_become_zero(activation_order: bool) -> None:
    weight, moment = layer()
    moment[3], moment[:, 3] = 0, 0
    assert not gptq_int(weight, moment, 32, activation_order=activation_order).weight[:, 3].any()
