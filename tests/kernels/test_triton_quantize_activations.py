"""`quantize_activations_triton` gives the reference's levels and scales, bit for bit.

The reference runs on the CPU, where it is the definition (see `test_triton_quantize`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, PAIRINGS
from olive.formats.activations import ACTIVATION_FORMATS
from olive.ops.reference_quantized import quantize_activations_reference
from tests.kernels.conftest import in_turn
from tests.kernels.quantized_cases import INT8_BOOKS, activations, how, static_scale
from tests.ops.cpu_cases import BOOKS, heavy_tailed, strided
from tests.ops.fixed_point import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((7, 75), (1, 1), (2, 141), (3, 32))


def _check(
    kernels: ModuleType,
    device: str,
    x: Tensor,
    arguments: tuple[Any, ...],
    dtype: torch.dtype = torch.float32,
) -> None:
    expected, expected_scale = quantize_activations_reference(x, *arguments, dtype)
    on_device = [part.to(device) if isinstance(part, Tensor) else part for part in arguments]
    levels, scale = kernels.quantize_activations_triton(x.to(device), *on_device, dtype)
    assert levels.dtype == dtype
    assert levels.shape == x.shape
    assert_same_bits(scale.cpu(), expected_scale)
    assert torch.equal(levels.cpu(), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_levels_and_scales_equal_the_reference(
    kernels: ModuleType, device: str, format: str, shape: tuple[int, int], group_size: int
) -> None:
    turn = SHAPES.index(shape) + GROUP_SIZES.index(group_size)
    types = FLOATS if format == "ovp8" else (torch.int8, *FLOATS)
    for book in in_turn(INT8_BOOKS if format == "ovp4" else [""], turn):
        for pairing in in_turn(PAIRINGS, turn // 2):
            x = activations(*shape, FLOATS[turn % 3])
            _check(kernels, device, x, how(format, group_size, pairing, book), types[turn % len(types)])


def test_levels_past_127_are_exact_in_float_types(kernels: ModuleType, device: str) -> None:
    for dtype in FLOATS:
        _check(kernels, device, activations(2, 40, torch.float32), how("ovp4", 32, book="flint4"), dtype)
        wide = torch.tensor([[1.0, 3000.0, 1e6, 2.0, 0.0, -2.0e5]])
        _check(kernels, device, wide, ("ovp8", 0, "optimal", None, static_scale(1.0)), dtype)


@pytest.mark.parametrize("format", ["ovp4", "ovp8"])
def test_many_spans_are_searched_alike(
    kernels: ModuleType, device: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many spans a program tries one candidate after another."""
    from olive.kernels import quantize_activations

    monkeypatch.setattr(quantize_activations, "FEW_SEGMENTS", 0)
    assert quantize_activations.plan_pairs(1, 75, True).candidates == 1
    for group_size in (-1, 32):
        _check(kernels, device, activations(7, 75, torch.float32), how(format, group_size))


@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_rows_longer_than_a_chunk_are_quantized_alike(kernels: ModuleType, device: str, format: str) -> None:
    """Three chunks, the last one ragged."""
    for group_size in in_turn([-1, 0], ACTIVATION_FORMATS.index(format)):
        _check(kernels, device, activations(1, 2 * 1024 + 37, torch.float32), how(format, group_size))


@pytest.mark.parametrize("at", [None, 3, 8191, 8192, 20_000])
def test_rows_that_do_not_fit_registers_are_read_twice(
    kernels: ModuleType, device: str, at: int | None
) -> None:
    x = activations(2, 20_001, torch.bfloat16)
    if at is not None:
        x[0, at] = float("nan")
        x[1, at] = 1000.0
    for group_size in (-1, 0):
        _check(kernels, device, x, how("int8", group_size), torch.int8)


def test_chunks_are_added_first_to_last(kernels: ModuleType, device: str) -> None:
    from tests.kernels.probes import chunk_sum_kernel

    values = torch.rand(4, 8, dtype=torch.float64) * torch.tensor([1.0, 1e17]).double().repeat(4)
    values[:, 5:] = 0
    sums = torch.empty(4, dtype=torch.float64, device=device)
    chunk_sum_kernel[(1,)](values.to(device), sums, 5, ROWS=4, CHUNKS=8, enable_fp_fusion=False)
    expected = torch.zeros(4, dtype=torch.float64)
    for chunk in range(5):
        expected += values[:, chunk]
    assert torch.equal(sums.cpu(), expected)


def test_integers_round_half_to_even(kernels: ModuleType, device: str) -> None:
    x = torch.arange(-131.0, 131.5, 0.5)[None]
    near = torch.nextafter(x, torch.zeros(()))
    for values in (x, near, torch.nextafter(x, 2 * x)):
        _check(kernels, device, values, ("int8", 0, "optimal", None, static_scale(1.0)))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_ties_between_eight_bit_levels_are_broken_alike(
    kernels: ModuleType, device: str, pairing: str
) -> None:
    """Halfway between outliers, at both ends of their range, and where normal values end."""
    from olive.formats.ovp8 import abfloat_magnitude

    levels = abfloat_magnitude(torch.arange(1, 65)).float()
    value = torch.cat(((levels[1:] + levels[:-1]) / 2, levels, torch.tensor([0.5, 126.5, 127.5, 128, 135.5])))
    value = torch.cat((value, torch.tensor([136.0, 1e5, 1e30]), torch.nextafter(value, torch.zeros(()))))
    value = torch.cat((value, -value))
    partners = [torch.zeros_like(value), value, -value, value.roll(1), value.roll(7)]
    x = torch.stack([torch.stack(pair, 1).reshape(-1) for p in partners for pair in ((value, p), (p, value))])
    _check(kernels, device, x, ("ovp8", 0, pairing, None, static_scale(1.0)))


@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_static_scales_of_every_kind(kernels: ModuleType, device: str, format: str) -> None:
    """Both rules, both signs, and the ends of float32, where x / scale or 1 / scale overflows or is tiny."""
    x = activations(6, 37, torch.float32)
    x[0, 0] = 1e38
    scales = [static_scale(value) for value in (2.0**-20, 1e-30, 2.0**-126, 1e30, 2.0**127)]
    if format != "int8":
        scales.append(static_scale(2.0**-130))  # 1 / scale is infinite, and 0 times it NaN
    if format == "ovp4":
        scales += [static_scale(value, plain=True) for value in (0.01, -0.01, 1e30)]
    for static in scales:
        _check(kernels, device, x, (*how(format, 0)[:4], static))


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_unusual_values_decide_alike(kernels: ModuleType, device: str, format: str, group_size: int) -> None:
    columns = 40
    tail = heavy_tailed(1, columns)
    border = torch.full((1, columns), 2.0**-61)
    border[0, 0] = 2.0**-60  # not yet a group of zeros; the rest of the row is, in groups of 32
    outlier, bad = tail.clone(), tail.clone()
    outlier[0, 20], bad[0, 39] = 80.0, float("inf")
    rows = [
        torch.zeros(1, columns),
        torch.ones(1, columns),
        torch.arange(columns)[None] / 4.0 - 8,
        border,
        border * (1 - 2.0**-20),
        outlier,
        bad,
        tail * 1e-30,
        tail * 1e-38,
        tail * 1e17,
        tail * 1e38,
    ]
    _check(kernels, device, torch.cat(rows), how(format, group_size))


@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_any_leading_shape_and_strides(kernels: ModuleType, device: str, format: str) -> None:
    for group_size in in_turn([-1, 0, 32], ACTIVATION_FORMATS.index(format)):
        arguments = how(format, group_size)
        for shape in ((45,), (2, 3, 45), (0, 45), (2, 0, 45)):
            _check(kernels, device, strided(torch.randn(shape)), arguments)
        _check(kernels, device, torch.randn(45, 3).t(), arguments)
    spread = strided(BOOKS["adaptive"].tensor())
    _check(kernels, device, torch.randn(2, 45), ("ovp4", 32, "optimal", spread, None))


def test_plans_cover_every_span(kernels: ModuleType, device: str) -> None:
    from olive.kernels.quantize_activations import MAX_WARPS, plan_pairs

    for spans in (1, 5, 300, 5000, 10**6):
        for width in (1, 32, 128, 1024, 1025, 14336, 32768, 10**5):
            for searched in (False, True):
                plan = plan_pairs(spans, width, searched)
                assert plan.chunks * 1024 >= width
                assert plan.warps <= MAX_WARPS
                pairs = 16 * plan.spans * plan.chunks * plan.candidates
                assert pairs <= 32 * 8 * plan.warps or width > 32768


def test_a_cuda_graph_replays_the_quantizing(kernels: ModuleType, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    for format in ACTIVATION_FORMATS:
        for group_size in GROUP_SIZES:
            arguments = [
                part.to(device) if isinstance(part, Tensor) else part for part in how(format, group_size)
            ]
            x = activations(7, 1600, torch.float16).to(device)
            expected = kernels.quantize_activations_triton(x, *arguments, torch.float16)  # compiles
            graph = torch.cuda.CUDAGraph()
            static = torch.zeros_like(x)
            with torch.cuda.graph(graph):
                found = kernels.quantize_activations_triton(static, *arguments, torch.float16)
            static.copy_(x)
            graph.replay()
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1]) or bool(expected[1].isnan().any())
