"""`uniform_linear` in Triton: the definition's bits for levels, float64 for floats, and that it compiles."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats.uniform import doubled_zero, storage_bits
from olive.ops.triton_uniform import uniform_linear_triton
from olive.ops.uniform import uniform_linear_reference
from tests.kernels.ahead_of_time import ONE_TYPE_EACH, SHARED_MEMORY, assert_never_fused, compile_kernel
from tests.kernels.conftest import INTERPRETING, in_turn
from tests.kernels.test_triton_linear import check_product
from tests.ops.cpu_cases import strided
from tests.ops.uniform_cases import NOT_QUANTIZED, UniformCase, magnitude, quantized_oracle, uniform_case

ROWS = (1, 16, 17, 65)
SHAPES = ((1, 1), (3, 5), (70, 131), (9, 300))  # N, K
BITS = range(1, 9)


def _run(device: str, x: Tensor, case: UniformCase, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
    arguments = (x, *case.arguments(bias), *how)
    return uniform_linear_triton(
        *(part.to(device) if isinstance(part, Tensor) else part for part in arguments)
    ).cpu()


@pytest.mark.parametrize("rows", ROWS)
def test_floats_are_within_the_rounding_of_float32(
    kernels: ModuleType, device: str, rows: int, dtype: torch.dtype
) -> None:
    for turn, (n, k) in enumerate(SHAPES, ROWS.index(rows)):
        for bits in in_turn(BITS, 3 * turn):
            case = uniform_case(n, k, bits, bool(turn % 2), (-1, 32, 64, 96)[turn % 4])
            x, bias = torch.randn(rows, k).to(dtype), torch.linspace(-1, 2, n) if turn % 2 else None
            check_product(_run(device, x, case, bias, NOT_QUANTIZED), x, case.weight, bias)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_levels_give_the_definitions_bits(kernels: ModuleType, device: str, bits: int, signed: bool) -> None:
    for turn, (n, k) in enumerate(SHAPES, bits):
        rows = ROWS[turn % len(ROWS)]
        for weight_bits in in_turn(BITS, 3 * turn + signed):
            case = uniform_case(n, k, weight_bits, bool(turn % 2))
            x, bias = torch.randn(rows, k), torch.linspace(-1, 2, n) if turn % 2 else None
            how = (0.1 + torch.rand(rows), torch.randn(k) if turn % 2 else None, bits, signed)
            found = _run(device, x, case, bias, how)
            assert torch.equal(found, uniform_linear_reference(x, *case.arguments(bias), *how))
            grouped = uniform_case(n, k, weight_bits, bool(turn % 2), 32)
            found = _run(device, x, grouped, bias, how)
            exact = quantized_oracle(x, grouped, bias, *how)
            largest = magnitude(torch.full_like(x, 256 * float(how[0].max())), grouped, bias)
            assert bool(((found.double() - exact).abs() <= largest * 2.0**-20).all())


def test_values_that_are_not_finite(kernels: ModuleType, device: str) -> None:
    case, x = uniform_case(4, 40, 4), torch.randn(4, 40)
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    for how in (NOT_QUANTIZED, (torch.ones(1), None, 4, True)):
        found = _run(device, x, case, None, how)
        expected = uniform_linear_reference(x, *case.arguments(), *how)
        assert torch.equal(found.isnan(), expected.isnan())


def test_other_groups_views_and_empty_batches(kernels: ModuleType, device: str) -> None:
    case, x = uniform_case(6, 45, 4, True, 7), torch.randn(2, 3, 45)
    expected = uniform_linear_reference(x, *case.arguments(), *NOT_QUANTIZED)
    assert torch.allclose(_run(device, strided(x), case, None, NOT_QUANTIZED), expected, atol=1e-6)
    case = uniform_case(6, 45, 4)
    how = (torch.full((3,), 0.1), None, 8, False)
    for offered in (NOT_QUANTIZED, how):
        expected = uniform_linear_reference(x, *case.arguments(), *offered)
        assert torch.allclose(_run(device, strided(x), case, None, offered), expected, atol=1e-5)
        assert _run(device, x[:0], case, None, offered).shape == (0, 3, 6)
    found = _run(device, x[0, 0], case, None, NOT_QUANTIZED)
    assert torch.allclose(
        found, uniform_linear_reference(x[0, 0], *case.arguments(), *NOT_QUANTIZED), atol=1e-5
    )


@pytest.mark.skipif(INTERPRETING, reason="Triton compiles nothing while it interprets")
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_compiles_to_matrix_units(capability: int, kind: str, levels: bool) -> None:
    from olive.kernels.uniform_linear import uniform_linear_kernel

    pointers = {"x_ptr": f"*{kind}", "codes_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": f"*{kind}"}
    constants: dict[str, Any] = {"bias_ptr": None, "x_scale_ptr": None}
    if levels:
        pointers |= {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "bias_ptr": f"*{kind}"}
        constants = {}
    for bits, group_size, block_m in ((2, 0, 16), (2, 0, 32 if levels else 64), (4, 128, 32)):
        compiled = compile_kernel(
            uniform_linear_kernel,
            pointers,
            {
                **constants,
                "WIDTH": storage_bits(bits),
                "BITS": bits,
                "ZERO": doubled_zero(bits, True),
                "SHIFTED": False,
                "GROUP_SIZE": group_size,
                "BLOCK_M": block_m,
                "BLOCK_N": 64,
                "BLOCK_K": 64,
            },
            capability,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=not levels,
        )
        assert re.search(r"\b(?:mma|wgmma|tcgen05)\.", compiled.ptx)
        if levels:
            assert_never_fused(compiled)
        assert compiled.shared <= SHARED_MEMORY
        usage = compiled.resources()
        assert usage["LOCAL"] == 0 and usage["STACK"] <= 8
