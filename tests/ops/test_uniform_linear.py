"""uniform_linear and uniform_decode: the definition against float64, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.ops.uniform import uniform_linear_reference
from tests.ops.cpu_cases import DTYPES, strided
from tests.ops.uniform_cases import (
    NOT_QUANTIZED,
    levels_of,
    magnitude,
    quantized_oracle,
    uniform_case,
)

BITS = range(1, 9)


def _x(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mid_rise", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_decode_is_level_times_scale(bits: int, mid_rise: bool) -> None:
    for columns, group_size in ((45, -1), (45, 7), (1, 3)):
        case = uniform_case(4, columns, bits, mid_rise, group_size)
        for dtype in DTYPES:
            found = ops.uniform_decode(case.codes, case.scale, columns, bits, mid_rise, group_size, dtype)
            assert torch.equal(found, case.weight.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_products_with_floats(bits: int, dtype: torch.dtype) -> None:
    for turn, shape in enumerate(((3, 45), (45,), (2, 2, 45), (0, 45), (1, 1))):
        case = uniform_case(5, shape[-1], bits, bool(turn % 2), 16 if turn else -1)
        x, bias = _x(*shape).to(dtype), _x(5) if turn % 2 else None
        found = uniform_linear_reference(x, *case.arguments(bias), *NOT_QUANTIZED)
        assert found.dtype == dtype and found.shape == (*shape[:-1], 5)
        exact = x.double() @ case.weight.t() + (0.0 if bias is None else bias.double())
        # float32 sums of 45 products, then one rounding of the output
        limit = magnitude(x, case, bias) * 45 * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps
        assert bool(((found.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_products_with_levels(bits: int, signed: bool) -> None:
    """Four float32 roundings after exact sums: of the sum, two products with scales, the bias."""
    for turn, shape in enumerate(((3, 45), (45,), (2, 7, 45), (0, 45))):
        for group_size in (-1, 16):
            case = uniform_case(5, 45, 1 + (bits + turn) % 8, bool(turn % 2), group_size)
            tokens = shape[-2] if turn in (0, 2) else 1
            scale = 0.05 + 0.2 * torch.rand(tokens)
            offset, bias = (_x(45), _x(5)) if turn % 2 else (None, None)
            x, how = 2 * _x(*shape), (scale, offset, bits, signed)
            found = ops.uniform_linear(x, *case.arguments(bias), *how)
            exact = quantized_oracle(x, case, bias, *how)
            assert found.shape == exact.shape
            limit = 2.0**-22 * (exact.abs() + (0.0 if bias is None else bias.abs().double())) + 1e-30
            assert bool(((found.double() - exact).abs() <= limit).all())


def test_levels_are_those_of_lsq() -> None:
    x, scale = 3 * _x(4, 6, 33), 0.1 + torch.rand(6)
    for bits in BITS:
        for signed in (True, False):
            expected = ops.lsq(x, scale, bits, signed, 1)
            found = levels_of(x, scale, None, bits, signed).float() * scale[:, None]
            assert torch.equal(found, expected)
            unit = uniform_case(33, 33, 4, False)
            codes = torch.full_like(unit.codes, 0x88)  # the level 0
            for k in range(33):
                codes[k, k // 2] += 1 << 4 * (k % 2)  # and 1 on the diagonal
            one = torch.ones(33, 1)
            found = ops.uniform_linear(x, codes, one, None, 4, False, -1, scale, None, bits, signed)
            assert torch.equal(found, expected)


def test_tiny_input_scales_count_as_the_least() -> None:
    case, x = uniform_case(3, 20, 4), _x(2, 20) * 1e-4
    for scale in (0.0, -1.0, 1e-9):
        found = ops.uniform_linear(x, *case.arguments(), torch.tensor([scale]), None, 8, True)
        expected = ops.uniform_linear(x, *case.arguments(), torch.tensor([1e-5]), None, 8, True)
        assert torch.equal(found, expected)


def test_values_that_are_not_finite() -> None:
    case, x = uniform_case(4, 40, 4), _x(5, 40)
    x[1, 3], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    found = ops.uniform_linear(x, *case.arguments(), *NOT_QUANTIZED)
    assert torch.isnan(found).all(1).tolist() == [False, True, True, True, False]
    for bits in (1, 8):  # levels have an end: an infinity takes it
        found = ops.uniform_linear(x, *case.arguments(), torch.tensor([0.1]), None, bits, True)
        assert torch.isnan(found).all(1).tolist() == [False, True, False, False, False]
        assert not torch.isnan(found[[0, 2, 3, 4]]).any()
    scale = torch.full((5,), 0.1)
    scale[4] = float("nan")
    found = ops.uniform_linear(x, *case.arguments(), scale, None, 8, True)
    assert torch.isnan(found).all(1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_are_those_of_the_decoded_weight(quantized: bool) -> None:
    for shape in ((80,), (3, 80), (2, 3, 80), (0, 80)):
        case = uniform_case(33, 80, 3, True, 32)
        how = (torch.tensor([0.1]), None, 4, True) if quantized else NOT_QUANTIZED
        x, bias = _x(*shape).requires_grad_(), _x(33).requires_grad_()
        grad = _x(*shape[:-1], 33, seed=8)
        found = torch.autograd.grad(ops.uniform_linear(x, *case.arguments(bias), *how), (x, bias), grad)
        expected = torch.autograd.grad(
            torch.nn.functional.linear(x, case.weight.float(), bias), (x, bias), grad
        )
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            limit = 1e-6 * other.abs().amax() if other.numel() else 0.0
            assert bool(((one - other).abs() <= limit).all())


def test_sixteen_bit_gradients_keep_their_dtypes() -> None:
    case = uniform_case(9, 32, 4)
    x, bias = _x(3, 32).bfloat16().requires_grad_(), _x(9).half().requires_grad_()
    ops.uniform_linear(x, *case.arguments(bias), *NOT_QUANTIZED).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((9,), 3.0).half())


@pytest.mark.parametrize("group_size", [-1, 32, 5])
def test_opcheck(group_size: int) -> None:
    case = uniform_case(4, 64, 3, True, group_size)
    x, bias = _x(2, 3, 64), torch.ones(4)
    for how in (NOT_QUANTIZED, (0.1 + torch.rand(3), _x(64), 5, False)):
        operator: Any = torch.ops.olive.uniform_linear.default
        torch.library.opcheck(operator, (x.clone().requires_grad_(), *case.arguments(bias), *how))
    stored = (case.codes, case.scale, 64, 3, True, group_size, torch.float16)
    torch.library.opcheck(torch.ops.olive.uniform_decode.default, stored)


def test_inputs_need_not_be_contiguous() -> None:
    case, x, bias, offset = uniform_case(6, 64, 4, True, 32), _x(2, 3, 64), _x(6), _x(64)
    for how in (NOT_QUANTIZED, (0.1 + torch.rand(3), offset, 8, True)):
        expected = ops.uniform_linear(x, *case.arguments(bias), *how)
        loose = [
            strided(part) if isinstance(part, Tensor) else part for part in (*case.arguments(bias), *how)
        ]
        assert torch.equal(ops.uniform_linear(strided(x), *loose), expected)


CASE = uniform_case(4, 32, 4, True, 16)
ONE = torch.ones(1)
REFUSED = [
    (
        {"input": torch.zeros(2, 32, dtype=torch.int32)},
        TypeError,
        "input: expected float32, bfloat16 or float16",
    ),
    ({"input": torch.tensor(1.0)}, ValueError, r"input: expected shape \[..., K\], got a scalar"),
    ({"input": torch.zeros(2, 30)}, ValueError, r"codes: expected shape \(4, 15\), got \(4, 16\)"),
    ({"input": torch.zeros(2, 33)}, ValueError, r"codes: expected shape \(4, 17\), got \(4, 16\)"),
    ({"input": torch.zeros(2, 0)}, ValueError, r"codes: expected shape \[N, bytes\] with N, K >= 1"),
    ({"codes": CASE.codes[0]}, ValueError, r"codes: expected shape \[N, bytes\] with N, K >= 1"),
    ({"codes": CASE.codes.char()}, TypeError, r"codes: expected torch.uint8, got torch.int8"),
    ({"scale": CASE.scale.half()}, TypeError, r"scale: expected torch.float32, got torch.float16"),
    ({"scale": CASE.scale[:, :1]}, ValueError, r"scale: expected shape \(4, 2\), got \(4, 1\)"),
    ({"bias": torch.ones(4, dtype=torch.int32)}, TypeError, "bias: expected float32, bfloat16 or float16"),
    ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(4,\), got \(5,\)"),
    ({"bits": 9}, ValueError, "bits: expected 1 to 8, got 9"),
    ({"group_size": 0}, ValueError, "group_size: expected -1 per channel, or columns, got 0"),
    (
        {"input_offset": torch.zeros(32)},
        ValueError,
        "input_offset: expected none without an input_scale, got one",
    ),
    ({"input_scale": torch.ones(3)}, ValueError, r"input_scale: expected shape \(2,\), got \(3,\)"),
    ({"input_scale": ONE.half()}, TypeError, "input_scale: expected torch.float32, got torch.float16"),
    ({"input_scale": ONE, "input_bits": 0}, ValueError, "bits: expected 1 to 8, got 0"),
    (
        {"input_scale": ONE, "input_offset": torch.zeros(31)},
        ValueError,
        r"input_offset: expected shape \(32,\), got \(31,\)",
    ),
    ({"bias": torch.ones(4, device="meta")}, ValueError, "input: expected every tensor on one device"),
]


@pytest.mark.parametrize(("change", "error", "match"), REFUSED)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    good = {
        "input": torch.zeros(2, 32),
        "codes": CASE.codes,
        "scale": CASE.scale,
        "bias": None,
        "bits": 4,
        "mid_rise": True,
        "group_size": 16,
        "input_scale": None,
        "input_offset": None,
        "input_bits": 8,
        "input_signed": True,
    }
    ops.uniform_linear(**good)
    with pytest.raises(error, match=match):
        ops.uniform_linear(**{**good, **change})


def test_decode_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16 or float16, got torch\.int8"):
        ops.uniform_decode(CASE.codes, CASE.scale, 32, 4, True, 16, torch.int8)
