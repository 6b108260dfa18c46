"""uniform_linear on every instruction set: the definition's bits for quantized inputs, float64 for others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.ops import cpu, cpu_uniform
from olive.ops.cpu_uniform import uniform_linear_cpu
from olive.ops.uniform import uniform_linear_reference
from tests.ops.cpu_cases import DTYPES, EACH_ISA, ISAS, NEEDS_KERNELS, strided
from tests.ops.uniform_cases import NOT_QUANTIZED, magnitude, quantized_oracle, uniform_case

pytestmark = NEEDS_KERNELS
BITS = range(1, 9)
# (M, N, K): one of each; tails below and beyond a vector of every width; whole vectors; several tiles.
SHAPES = ((1, 1, 1), (1, 5, 45), (2, 7, 130), (5, 6, 256), (3, 9, 300), (9, 4, 513), (1, 10, 1100))
GROUPS = (32, 64, 96, 128, 160, 256)


def _x(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _how(turn: int, m: int, k: int, bits: int, signed: bool) -> tuple[Any, ...]:
    scale = 0.6 / 2**bits * (1 + torch.rand(m if turn % 2 else 1))
    return (2 * scale, 0.3 * _x(k, seed=turn) if turn % 3 else None, bits, signed)


@EACH_ISA
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_levels_with_one_scale_per_row_give_the_definitions_bits(bits: int, signed: bool, isa: str) -> None:
    for turn, (m, n, k) in enumerate(SHAPES):
        for width in (2, 4, 8):
            case = uniform_case(n, k, width - turn % 2, bool(turn % 2), -1, seed=turn)
            x, how = _x(m, k).to(DTYPES[turn % 3]), _how(turn, m, k, bits, signed)
            bias = _x(n).to(DTYPES[(turn + 1) % 3]) if turn % 2 else None
            found = uniform_linear_cpu(x, *case.arguments(bias), *how, isa)
            expected = uniform_linear_reference(x, *case.arguments(bias), *how)
            assert torch.equal(found, expected)


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUPS)
def test_levels_with_groups_are_within_float32(group_size: int, isa: str) -> None:
    """One rounding for each group's sum, product and addition, then the scale's, the bias's and the last."""
    for turn, (m, n, k) in enumerate(SHAPES):
        for bits in BITS:
            case = uniform_case(n, k, bits, bool(turn % 2), group_size, seed=turn)
            x, how = _x(m, k), _how(turn, m, k, 1 + (bits + turn) % 8, bool(bits % 2))
            bias = _x(n) if turn % 2 else None
            found = uniform_linear_cpu(x, *case.arguments(bias), *how, isa)
            exact = quantized_oracle(x, case, bias, *how)
            q = ops.lsq(x if how[1] is None else x + how[1], how[0], how[2], how[3], 0)
            limit = magnitude(q, case, bias) * (8 + k // group_size) * 2.0**-24
            assert bool(((found.double() - exact).abs() <= limit + 1e-30).all())


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_floats_are_as_exact_as_their_fixed_point_is(bits: int, dtype: torch.dtype, isa: str) -> None:
    """Half a unit of the block's digits per activation, float32 sums, one rounding of the output."""
    unit = 2.0**-22 if dtype == torch.float32 else 2.0**-14
    for turn, (m, n, k) in enumerate(SHAPES):
        for group_size in (-1, GROUPS[(turn + bits) % len(GROUPS)]):
            case = uniform_case(n, k, bits, bool(turn % 2), group_size, seed=turn)
            x, bias = _x(m, k), _x(n) if turn % 2 else None
            x[:, k // 2] *= 80
            x[-1, : k // 2] = 0
            x = x.to(dtype)
            found = uniform_linear_cpu(x, *case.arguments(bias), *NOT_QUANTIZED, isa)
            exact = x.double() @ case.weight.t() + (0.0 if bias is None else bias.double())
            largest = torch.stack([part.abs().amax(1) for part in x.double().split(128, 1)], 1)
            weights = torch.stack([part.abs().sum(1) for part in case.weight.split(128, 1)], 1)
            limit = unit / 2 * (largest @ weights.t())
            limit = limit + magnitude(x, case, bias) * (8 + k // 32) * 2.0**-24
            limit = limit + exact.abs() * torch.finfo(dtype).eps
            assert found.dtype == dtype
            assert bool(((found.double() - exact).abs() <= limit + 1e-30).all())


@EACH_ISA
def test_bfloat16_loses_nothing_beside_torch(isa: str) -> None:
    """At most torch's own error with the decoded weight rounded to bfloat16, over all rows together."""
    for bits in (2, 3, 4, 8):
        case = uniform_case(64, 1024, bits, True, -1)
        x = _x(32, 1024).bfloat16()
        exact = x.double() @ case.weight.t()
        torchs = (torch.nn.functional.linear(x, case.weight.bfloat16()).double() - exact).norm()
        found = uniform_linear_cpu(x, *case.arguments(), *NOT_QUANTIZED, isa)
        assert float((found.double() - exact).norm()) <= float(torchs)


@pytest.mark.parametrize("bits", BITS)
def test_instruction_sets_give_the_same_bits(bits: int) -> None:
    for turn, (m, n, k) in enumerate(SHAPES):
        for group_size in (-1, GROUPS[(turn + bits) % len(GROUPS)]):
            case = uniform_case(n, k, bits, bool(turn % 2), group_size, seed=turn)
            for dtype in DTYPES:
                x = _x(m, k).to(dtype)
                for how in (NOT_QUANTIZED, _how(turn, m, k, 4, True)):
                    found = [uniform_linear_cpu(x, *case.arguments(), *how, isa) for isa in ISAS]
                    assert all(torch.equal(found[0], other) for other in found[1:])


@EACH_ISA
def test_extreme_levels_do_not_overflow(isa: str) -> None:
    """Every code and every level the largest there is: what sums in 16 and 32 bits have to hold."""
    for k in (1025, 40_000):
        for bits in (2, 4, 8):
            for mid_rise in (True, False):
                case = uniform_case(3, k, bits, mid_rise)
                for byte in (0, 255):
                    codes = torch.full_like(case.codes, byte)
                    stored = (codes, case.scale, None, bits, mid_rise, -1)
                    for value, signed in ((1e9, True), (-1e9, True), (1e9, False)):
                        how = (torch.ones(1), None, 8, signed)
                        x = torch.full((2, k), value)
                        found = uniform_linear_cpu(x, *stored, *how, isa)
                        assert torch.equal(found, uniform_linear_reference(x, *stored, *how))
                    for dtype in DTYPES[:2]:
                        x = torch.full((2, k), -1.9921875, dtype=dtype)
                        found = uniform_linear_cpu(x, *stored, *NOT_QUANTIZED, isa)
                        weight = ops.uniform_decode(*stored[:2], k, bits, mid_rise, -1, torch.float32)
                        exact = x.double() @ weight.double().t()
                        limit = exact.abs() * (torch.finfo(dtype).eps + k // 128 * 2.0**-24)
                        assert bool(((found.double() - exact).abs() <= limit).all())


@EACH_ISA
def test_halves_round_to_even(isa: str) -> None:
    case = uniform_case(4, 64, 4)
    x = (torch.arange(64) - 32).float().expand(2, -1) / 2
    for signed in (True, False):
        how = (torch.ones(1), None, 8, signed)
        expected = uniform_linear_reference(x, *case.arguments(), *how)
        assert torch.equal(uniform_linear_cpu(x, *case.arguments(), *how, isa), expected)


@EACH_ISA
def test_values_that_are_not_finite(isa: str) -> None:
    for group_size in (-1, 32):
        for m in (1, 5):
            case = uniform_case(6, 150, 4, True, group_size)
            for value in (float("nan"), float("inf"), -float("inf")):
                for column in (0, 149):
                    x = _x(m, 150)
                    x[m // 2, column] = value
                    for how in (
                        NOT_QUANTIZED,
                        (torch.full((1,), 0.1), None, 4, True),
                        (torch.ones(1), None, 1, True),
                    ):
                        found = uniform_linear_cpu(x, *case.arguments(), *how, isa)
                        expected = uniform_linear_reference(x, *case.arguments(), *how)
                        assert torch.equal(found.isnan(), expected.isnan())
    scale = torch.tensor([0.1, float("nan"), 0.0, float("inf")])
    x, case = _x(4, 150), uniform_case(6, 150, 4)
    found = uniform_linear_cpu(x, *case.arguments(), scale, None, 4, True, isa)
    expected = uniform_linear_reference(x, *case.arguments(), scale, None, 4, True)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[2], expected[2])


@EACH_ISA
def test_zeros_and_empty_batches(isa: str) -> None:
    case = uniform_case(5, 70, 3, True, 32)
    for how in (NOT_QUANTIZED, (torch.ones(1), None, 4, True)):
        found = uniform_linear_cpu(torch.zeros(2, 70), *case.arguments(), *how, isa)
        assert torch.equal(found, torch.zeros(2, 5))
        assert uniform_linear_cpu(torch.zeros(0, 3, 70), *case.arguments(), *how, isa).shape == (0, 3, 5)
        assert uniform_linear_cpu(torch.zeros(70), *case.arguments(), *how, isa).shape == (5,)


@EACH_ISA
def test_tokens_have_their_scales_in_every_batch(isa: str) -> None:
    case, x = uniform_case(5, 70, 4), _x(3, 4, 70)
    how = (0.05 + torch.rand(4), None, 4, True)
    found = uniform_linear_cpu(x, *case.arguments(), *how, isa)
    assert torch.equal(found, uniform_linear_reference(x, *case.arguments(), *how))


@EACH_ISA
def test_inputs_need_not_be_contiguous_or_aligned(isa: str) -> None:
    case, x, bias = uniform_case(6, 200, 4, True, 32), _x(3, 200), _x(6)
    for how in (NOT_QUANTIZED, (0.1 + torch.rand(3), _x(200), 8, True)):
        expected = uniform_linear_cpu(x, *case.arguments(bias), *how, isa)
        loose = [
            strided(part) if isinstance(part, Tensor) else part for part in (*case.arguments(bias), *how)
        ]
        assert torch.equal(uniform_linear_cpu(strided(x), *loose, isa), expected)
        shifted = torch.empty(case.codes.numel() + 1, dtype=torch.uint8)[1:].view(case.codes.shape)
        shifted.copy_(case.codes)
        stored = (shifted, *case.arguments(bias)[1:])
        assert torch.equal(uniform_linear_cpu(x, *stored, *how, isa), expected)


@EACH_ISA
def test_threads_share_the_work(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for m, n in ((1, 4001), (130, 70)):
            case, x = uniform_case(n, 256, 4), _x(m, 256)
            for how in (NOT_QUANTIZED, (torch.full((1,), 0.1), None, 8, True)):
                found = []
                for count in (1, 3):
                    torch.set_num_threads(count)
                    found.append(uniform_linear_cpu(x, *case.arguments(), *how, isa))
                assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)


def test_other_groups_go_to_the_reference_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    cpu_uniform._log_once.cache_clear()
    case, x = uniform_case(4, 90, 4, True, 45), _x(2, 90)
    with caplog.at_level(logging.WARNING, logger="olive"):
        for _ in range(2):
            found = ops.uniform_linear(x, *case.arguments(), *NOT_QUANTIZED)
    assert torch.equal(found, uniform_linear_reference(x, *case.arguments(), *NOT_QUANTIZED))
    assert [record.message for record in caplog.records] == [
        "uniform_linear: using the slow reference operator, because the kernels need groups of a multiple of "
        "32 columns, got 45"
    ]
    wide = uniform_case(1, 2**18 + 1, 1)
    how = (torch.ones(1), None, 1, True)
    found = ops.uniform_linear(torch.ones(1, 2**18 + 1), *wide.arguments(), *how)
    assert float(found) == float(wide.levels.sum().float() * wide.scale)


def test_one_group_beyond_k_is_one_scale() -> None:
    case = uniform_case(4, 40, 4, True, 45)
    how = (torch.full((1,), 0.1), None, 4, True)
    x = _x(2, 40)
    assert torch.equal(
        uniform_linear_cpu(x, *case.arguments(), *how), uniform_linear_reference(x, *case.arguments(), *how)
    )


GOOD: list[Any] = [1, 0, 1, 1, 32, 4, True, -1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, "portable"]


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (2, -1, "m: expected at least 0, got -1"),
        (3, 0, "shape: expected N, K >= 1 and K <= 2"),
        (4, 2**18 + 1, "shape: expected N, K >= 1 and K <= 2"),
        (5, 9, "bits: expected 1 to 8, got 9"),
        (7, 33, "group_size: expected -1 or a multiple of 32, got 33"),
        (8, 0, "codes: expected an address, got 0"),
        (18, "sse", "isa: expected portable"),
    ],
)
def test_bindings_check_what_memory_needs(place: int, value: Any, match: str) -> None:
    arguments = [*GOOD[:place], value, *GOOD[place + 1 :]]
    with pytest.raises(ValueError, match=match):
        cpu.cpu_kernels().uniform_linear(*arguments)


@pytest.mark.parametrize(
    ("scales", "qmin", "qmax", "match"),
    [
        (0, 0, 1, "input_scales: expected at least 1"),
        (1, -129, 0, "qmin, qmax: expected the range of a byte"),
        (1, 0, 256, "qmin, qmax: expected the range of a byte"),
        (1, -1, 128, "qmin, qmax: expected the range of a byte"),
        (1, 1, 0, "qmin, qmax: expected the range of a byte"),
    ],
)
def test_bindings_check_levels(scales: int, qmin: int, qmax: int, match: str) -> None:
    arguments = [*GOOD[:13], 1, scales, 0, qmin, qmax, "portable"]
    with pytest.raises(ValueError, match=match):
        cpu.cpu_kernels().uniform_linear(*arguments)
