"""Quantizers of weights agree with the grids they say they are on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive.ops import statsq_margin
from olive.qat.weight_quantizers import LSQWeight, MinMax, StatsQ, WeightQuantizer


def _quantizer(kind: str, bits: int, weight: Tensor) -> WeightQuantizer:
    if kind == "lsq":
        return LSQWeight(bits, weight)
    return MinMax(bits) if kind == "minmax" else StatsQ(bits, 16 if kind == "groups" else -1)


KINDS = ["statsq", "groups", "lsq", "minmax"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 40), (1, 1), (6, 3, 2, 2)])
def test_grid_says_what_forward_does(kind: str, bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    quantizer = _quantizer(kind, bits, weight)
    grid = quantizer.grid(weight)
    code = grid.code(weight)
    assert code.min() >= grid.qmin and code.max() <= grid.qmax and grid.qmax - grid.qmin < 2**bits
    # Division by the step, and by the scale, round differently: on a threshold a value may go either way.
    near = grid.from_threshold(weight).abs() < 1e-4
    expected = quantizer(weight).flatten(1)
    differs = (grid.level(code) - expected).abs() <= 1e-6 * expected.abs()
    assert bool((differs | near).all())


@pytest.mark.parametrize("kind", KINDS)
def test_margin_is_the_distance_to_the_nearest_threshold(kind: str) -> None:
    weight = torch.randn(8, 40, dtype=torch.float64)
    quantizer = _quantizer(kind, 3, weight.float())
    grid = quantizer.grid(weight.float())
    thresholds = torch.arange(grid.qmin + 1, grid.qmax + 1, dtype=torch.float64)
    step = grid.step.double().expand(8, 40) if kind != "groups" else grid.step.double()
    distance = (weight / step + grid.offset)[..., None] - thresholds
    expected = distance.abs().amin(-1)
    assert torch.allclose(quantizer.margin(weight.float()).double(), expected, atol=1e-5)


def test_margin_of_statsq_is_that_of_its_operator() -> None:
    weight = torch.randn(8, 40)
    generic = StatsQ(2).grid(weight).from_threshold(weight).abs()
    assert torch.allclose(statsq_margin(weight, 2, -1), generic, atol=1e-6)


@pytest.mark.parametrize("kind", ["statsq", "minmax"])
def test_gradient_reaches_every_weight_as_it_is(kind: str) -> None:
    weight = torch.randn(8, 40, requires_grad=True)
    _quantizer(kind, 2, weight)(weight).backward(gradient := torch.randn(8, 40))
    assert torch.equal(weight.grad, gradient)


def test_lsq_learns_its_scale() -> None:
    weight = torch.randn(8, 40, requires_grad=True)
    quantizer = LSQWeight(2, weight)
    quantizer(weight).square().sum().backward()
    assert quantizer.scale.grad.shape == (8,) and bool((quantizer.scale.grad != 0).all())


def test_minmax_keeps_the_largest_weight() -> None:
    weight = torch.randn(8, 40)
    quantized = MinMax(8)(weight)
    assert torch.allclose(quantized.abs().amax(1), weight.abs().amax(1))
    assert (quantized - weight).abs().max() <= weight.abs().max() / 254 * 1.001


@pytest.mark.parametrize("kind", ["statsq", "groups", "minmax"])
def test_zeros_stay_zeros(kind: str) -> None:
    weight = torch.zeros(4, 32)
    quantizer = _quantizer(kind, 2, weight)
    assert torch.equal(quantizer(weight), weight)
    assert quantizer.grid(weight).position(weight).isfinite().all()
