"""Operators on quantized activations and 8-bit weights: gradients, opcheck, the floating-point path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.formats import get_codebook, pack_scale
from olive.ops.float_activations import carrier_dtype, linear_float_activations

ROWS, COLUMNS = 9, 80
STATIC = pack_scale(torch.tensor([0.03]), torch.tensor([False]))
Stored = tuple[Tensor, Tensor, Tensor | None]


def weight(bits: int = 4, codebook: str = "adaptive", group_size: int = 32) -> Stored:
    float_weight = torch.randn(ROWS, COLUMNS)
    if bits == 8:
        return (*ops.ovp8_quantize(float_weight, group_size, "optimal", [1.0, 2.0]), None)
    table = get_codebook(codebook).tensor()
    codes, scale = ops.ovp_quantize(float_weight, table, group_size, "optimal", [0.6, 1.0], [0.8, 1.0], None)
    return codes, scale, table


def decoded(stored: Stored, group_size: int = 32) -> Tensor:
    codes, scale, table = stored
    size = (COLUMNS, group_size, torch.float32)
    out: Tensor = (
        ops.ovp8_decode(codes, scale, *size) if table is None else ops.ovp_decode(codes, scale, table, *size)
    )
    return out


def activation(name: str, group_size: int, codebook: str = "int4") -> tuple[Any, ...]:
    """The last five arguments."""
    table = get_codebook(codebook).tensor() if name == "ovp4" else None
    return name, group_size, "optimal", table, STATIC if group_size == 0 else None


Linear = Callable[[Tensor, Tensor | None], Tensor]


def integer(stored: Stored, format: tuple[Any, ...]) -> Linear:
    return lambda x, bias: ops.ovp_linear_quantized(x, *stored, bias, ROWS, 32, *format)


def floating(stored: Stored, format: tuple[Any, ...]) -> Linear:
    return lambda x, bias: linear_float_activations(x, *stored, bias, ROWS, 32, *format)


def eight(stored: Stored) -> Linear:
    return lambda x, bias: ops.ovp8_linear(x, stored[0], stored[1], bias, ROWS, 32)


def cases() -> dict[str, tuple[Stored, Linear]]:
    four, flint, wide = weight(), weight(codebook="flint4"), weight(bits=8)
    return {
        "integer int8": (four, integer(four, activation("int8", -1))),
        "integer ovp4 groups": (four, integer(four, activation("ovp4", 64, "adaptive"))),
        "integer static": (four, integer(four, activation("int8", 0))),
        "float flint4": (flint, floating(flint, activation("int8", -1))),
        "float flint4 activations": (four, floating(four, activation("ovp4", 32, "flint4"))),
        "float ovp8": (four, floating(four, activation("ovp8", -1))),
        "float 8 bits": (wide, floating(wide, activation("ovp8", 0))),
        "8 bits": (wide, eight(wide)),
    }


CASES = list(cases())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(COLUMNS,), (2, 3, COLUMNS), (0, COLUMNS)])
def test_gradient_goes_straight_through_the_rounding(name: str, shape: tuple[int, ...]) -> None:
    stored, linear = cases()[name]
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    grad = torch.randn(*shape[:-1], ROWS)
    got = torch.autograd.grad(linear(x, bias), (x, bias), grad)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, decoded(stored), bias), (x, bias), grad)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        limit = 2e-6 * other.abs().amax() if other.numel() else 0.0  # float32 sums in another order
        assert bool(((one - other).abs() <= limit).all())


@pytest.mark.parametrize("name", CASES)
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    _, linear = cases()[name]
    assert not linear(torch.randn(2, COLUMNS), None).requires_grad
    bias = torch.zeros(ROWS, requires_grad=True)
    linear(torch.randn(3, COLUMNS), bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((ROWS,), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 0, 32, 64])
@pytest.mark.parametrize(
    ("name", "codebook"), [("int8", ""), ("ovp4", "int4"), ("ovp4", "flint4"), ("ovp8", "")]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_floating_point_path_multiplies_levels(
    bits: int, name: str, codebook: str, group_size: int, dtype: torch.dtype
) -> None:
    stored, format = weight(bits), activation(name, group_size, codebook)
    x, bias = (3 * torch.randn(5, COLUMNS)).to(dtype), torch.randn(ROWS).to(dtype)
    got = floating(stored, format)(x, bias)
    levels, scale = ops.quantize_activations(x, *format, torch.float32)
    steps = scale if group_size <= 0 else scale.repeat_interleave(group_size, 1)[:, :COLUMNS]
    exact = (levels * steps).double() @ decoded(stored).double().T + bias.double()
    assert got.dtype == dtype
    # float32 inputs are held to 2^-22 of a block's largest magnitude; then one rounding to the output's type.
    limit = (1e-5 + torch.finfo(dtype).eps) * exact.abs().amax()
    assert bool(((got.double() - exact).abs() <= limit).all())


def test_both_paths_agree_where_both_can_be_taken() -> None:
    stored, x, bias = weight(), torch.randn(4, COLUMNS), torch.randn(ROWS)
    for format in (activation("int8", -1), activation("ovp4", 32, "adaptive"), activation("int8", 0)):
        one, other = integer(stored, format)(x, bias), floating(stored, format)(x, bias)
        assert bool(((one - other).abs() <= 1e-5 * one.abs().max()).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_token_that_is_not_finite_gives_nan(bits: int, group_size: int) -> None:
    x = torch.randn(3, COLUMNS)
    x[1, 40] = float("inf")
    out = floating(weight(bits), activation("ovp8", group_size))(x, None)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_the_integer_operator_names_the_way_out_for_flint4() -> None:
    with pytest.raises(ValueError, match=r"expected levels up to 127 .*multiply in floating point"):
        integer(weight(codebook="flint4"), activation("int8", -1))(torch.randn(2, COLUMNS), None)


def test_carrier() -> None:
    assert carrier_dtype(torch.device("cpu")) == torch.float32
    assert carrier_dtype(torch.device("cuda")) == torch.bfloat16


def test_opcheck() -> None:
    four, wide = weight(), weight(bits=8)
    x = torch.randn(3, COLUMNS)
    bias = torch.randn(ROWS, requires_grad=True)
    for format in (activation("int8", -1), activation("ovp4", 32, "adaptive"), activation("ovp8", 0)):
        torch.library.opcheck(ops.quantize_activations, (x, *format, torch.float32))
    for format in (activation("int8", 64), activation("ovp4", 0)):
        torch.library.opcheck(
            ops.ovp_linear_quantized, (x.clone().requires_grad_(), *four, bias, ROWS, 32, *format)
        )
    for stored, format in ((four, activation("ovp8", -1)), (wide, activation("int8", 32))):
        torch.library.opcheck(
            linear_float_activations, (x.clone().requires_grad_(), *stored, bias, ROWS, 32, *format)
        )
    torch.library.opcheck(ops.ovp8_quantize, (torch.randn(4, 33), 32, "paper", [1.0, 2.0]))
    torch.library.opcheck(ops.ovp8_decode, (*wide[:2], COLUMNS, 32, torch.bfloat16))
    torch.library.opcheck(ops.ovp8_linear, (x.clone().requires_grad_(), *wide[:2], bias, ROWS, 32))
