"""LSQ: levels, and gradients against an independent definition by automatic differentiation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.ops.lsq import LEAST_SCALE, integer_range, lsq_initial_scale
from tests.ops.cpu_cases import DTYPES

SHAPES = ((7,), (5, 12), (2, 3, 9), (2, 2, 5, 4))


def _input(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scale(input: Tensor, dim: int | None) -> Tensor:
    size = 1 if dim is None else input.shape[dim]
    return 0.2 + 0.3 * torch.rand(size, generator=torch.Generator().manual_seed(3))


def _by_autograd(input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int) -> Tensor:
    """The same function written with detached roundings; gradients of the scale are multiplied by g."""
    qmin, qmax = integer_range(bits, signed)
    shape = [1] * input.dim()
    shape[dim] = len(scale)
    factor = 1 / math.sqrt(qmax * (input.numel() // len(scale)))
    slow = scale * factor + (scale - scale * factor).detach()
    used = (slow + (slow.clamp(min=LEAST_SCALE) - slow).detach()).view(shape)
    steps = (input / used).clamp(qmin, qmax)
    rounded = torch.where(steps >= 0, 1.0, -1.0).double() if signed and bits == 1 else steps.round()
    return (steps + (rounded - steps).detach()) * used


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], bits: int, signed: bool) -> None:
    for dim in (None, *range(len(shape)), -1):
        place = -1 if dim is None else dim
        input, grad = 2 * _input(*shape), _input(*shape, seed=1)
        scale = _scale(input, dim)
        exact = [input.double().requires_grad_(), scale.double().requires_grad_()]
        ours = [input.clone().requires_grad_(), scale.clone().requires_grad_()]
        expected = _by_autograd(exact[0], exact[1], bits, signed, place)
        found = ops.lsq(ours[0], ours[1], bits, signed, place)
        assert torch.allclose(found.double(), expected, rtol=1e-6)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        got = torch.autograd.grad(found, ours, grad)
        # At +-1 the one-bit sign has no slope in the scale but that of its level: the clamp's, as stated.
        assert torch.allclose(got[0].double(), wanted[0], rtol=1e-5, atol=1e-7)
        assert torch.allclose(got[1].double(), wanted[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    input, scale = (3 * _input(4, 33)).to(dtype), torch.tensor([0.13])
    found = ops.lsq(input, scale, 4, True, -1)
    assert found.dtype == dtype
    assert torch.equal(found, ops.lsq(input.float(), scale, 4, True, -1).to(dtype))


def test_tiny_scales_count_as_the_least_and_go_on_learning() -> None:
    input, scale = _input(64), torch.zeros(1, requires_grad=True)
    found = ops.lsq(input, scale, 3, True, -1)
    assert torch.equal(found, ops.lsq(input, torch.tensor([LEAST_SCALE]), 3, True, -1))
    (grad,) = torch.autograd.grad(found.sum(), scale)
    assert bool(torch.isfinite(grad).all()) and bool(grad.any())


def test_the_first_scale() -> None:
    input = _input(6, 5, 4)
    mean = input.abs().mean()
    assert torch.allclose(lsq_initial_scale(input, 4, True, None), 2 * mean / math.sqrt(7))
    assert torch.allclose(lsq_initial_scale(input, 4, False, None), 2 * mean / math.sqrt(15))
    by_place = input.abs().mean((0, 2))
    assert torch.allclose(lsq_initial_scale(input, 4, True, 1), 2 * by_place / math.sqrt(7))
    assert torch.allclose(lsq_initial_scale(input, 4, False, -2), 4 * by_place / math.sqrt(15))


def test_as_an_operator() -> None:
    input, scale = _input(3, 8).requires_grad_(), torch.full((8,), 0.3, requires_grad=True)
    torch.library.opcheck(torch.ops.olive.lsq.default, (input, scale, 3, True, 1))
    plain = (input.detach(), input.detach(), scale.detach(), 3, False, 1)
    torch.library.opcheck(torch.ops.olive.lsq_backward.default, plain)


def test_results_are_contiguous_whatever_the_input_is() -> None:
    input, scale = _input(8, 6).T, torch.full((6,), 0.3)
    found = ops.lsq(input, scale, 3, True, 0)
    grad_input, _ = torch.ops.olive.lsq_backward(input, input, scale, 3, True, 0)
    assert found.is_contiguous() and grad_input.is_contiguous()
    torch.library.opcheck(torch.ops.olive.lsq.default, (input, scale, 3, True, 0))
    torch.library.opcheck(torch.ops.olive.lsq_backward.default, (input, input, scale, 3, True, 0))


def test_bad_arguments() -> None:
    input, scale = _input(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 0"):
        ops.lsq(input, scale, 0, True, 1)
    with pytest.raises(ValueError, match=r"dim: expected a dimension of an input \(3, 8\), got 2"):
        ops.lsq(input, scale, 4, True, 2)
    with pytest.raises(ValueError, match=r"scale: expected shape \(3,\), got \(8,\)"):
        ops.lsq(input, scale, 4, True, 0)
    with pytest.raises(TypeError, match=r"scale: expected torch\.float32"):
        ops.lsq(input, scale.double(), 4, True, 1)
    with pytest.raises(TypeError, match="input: expected float32, bfloat16 or float16"):
        ops.lsq(input.long(), scale, 4, True, 1)
    backward = torch.ops.olive.lsq_backward
    with pytest.raises(TypeError, match=r"grad: expected torch\.float32, got torch\.bfloat16"):
        backward(input.bfloat16(), input, scale, 4, True, 1)
    with pytest.raises(ValueError, match=r"grad: expected shape \(3, 8\), got \(2, 8\)"):
        backward(input[:2], input, scale, 4, True, 1)
    with pytest.raises(ValueError, match="expected every tensor on one device"):
        backward(input.to("meta"), input, scale, 4, True, 1)
