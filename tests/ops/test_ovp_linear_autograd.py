"""Gradients of ovp_linear: those of a linear layer with the decoded weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.formats import get_codebook


def weight(rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    table = get_codebook("adaptive").tensor()
    codes, scale = ops.ovp_quantize(
        torch.randn(rows, columns), table, group_size, "optimal", [0.6, 0.8, 1.0], [0.8, 1.0], None
    )
    return codes, scale, table


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1, 0])
@pytest.mark.parametrize(("shape", "rows"), [((80,), 33), ((3, 80), 33), ((2, 3, 33), 5), ((0, 80), 33)])
def test_same_as_autograd_of_the_decoded_weight(
    packed: bool, group_size: int, shape: tuple[int, ...], rows: int
) -> None:
    columns = shape[-1]
    codes, scale, table = weight(rows, columns, group_size)
    decoded = ops.ovp_decode(codes, scale, table, columns, group_size, torch.float32)
    if packed:
        codes, scale = ops.ovp_pack(codes, scale, columns, group_size)
    grad = torch.randn(*shape[:-1], rows)
    input, bias = torch.randn(shape, requires_grad=True), torch.randn(rows, requires_grad=True)
    got = torch.autograd.grad(
        ops.ovp_linear(input, codes, scale, table, bias, rows, group_size), (input, bias), grad
    )
    expected = torch.autograd.grad(torch.nn.functional.linear(input, decoded, bias), (input, bias), grad)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        limit = 1e-6 * other.abs().amax() if other.numel() else 0.0  # float32 sums in another order
        assert bool(((one - other).abs() <= limit).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_as_good_as_those_of_torch(dtype: torch.dtype) -> None:
    codes, scale, table = weight(64, 96, 32)
    decoded = ops.ovp_decode(codes, scale, table, 96, 32, torch.float32)
    grad = torch.randn(7, 64).to(dtype)
    input = torch.randn(7, 96, dtype=dtype, requires_grad=True)
    bias = torch.randn(64, dtype=dtype, requires_grad=True)
    ops.ovp_linear(input, codes, scale, table, bias, 64, 32).backward(grad)
    exact = grad.double() @ decoded.double()
    torchs = (grad @ decoded.to(dtype)).double()
    assert input.grad is not None and bias.grad is not None
    assert input.grad.dtype == dtype and bias.grad.dtype == dtype
    assert bool((input.grad.double() - exact).abs().max() <= 2 * (torchs - exact).abs().max())
    exact = grad.double().sum(0)
    assert bool(((bias.grad.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all())


def test_only_the_bias_needs_a_gradient() -> None:
    codes, scale, table = weight(5, 32, 32)
    bias = torch.zeros(5, requires_grad=True)
    ops.ovp_linear(torch.randn(3, 32), codes, scale, table, bias, 5, 32).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((5,), 3.0))


def test_the_quantized_weight_gets_no_gradient() -> None:
    codes, scale, table = weight(5, 32, 32)
    out = ops.ovp_linear(torch.randn(3, 32), codes, scale, table, None, 5, 32)
    assert not out.requires_grad
