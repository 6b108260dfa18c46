"""The Triton kernels of training give the reference's bits, and gradients of scales near float64's.

The reference runs on the CPU, where it is the definition.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.ops import triton_training
from olive.ops.lsq import lsq_backward_reference, lsq_reference
from olive.ops.oscillation import oscillation_reference_
from olive.ops.statsq import statsq_codes_reference, statsq_margin_reference, statsq_reference
from tests.kernels.conftest import in_turn
from tests.ops.cpu_cases import heavy_tailed, strided
from tests.ops.fixed_point import assert_same_bits
from tests.ops.test_cpu_training import UNUSUAL, unusual

# One value; a tail; more groups than a program has.
WEIGHTS = ((1, 1), (3, 7), (5, 3, 19), (9, 700))
INPUTS = ((1,), (130,), (3, 7, 20), (2, 3, 5, 130), (70, 131))
BITS = (1, 2, 4, 8)
FORMATS = ((1, True), (1, False), (2, True), (4, False), (8, True), (8, False))


def _check_statsq(device: str, weight: Tensor, bits: int, group_size: int) -> None:
    moved = weight.to(device)
    codes, scale = triton_training.statsq_codes_triton(moved, bits, group_size)
    expected_codes, expected_scale = statsq_codes_reference(weight, bits, group_size)
    assert_same_bits(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu(), expected_codes)
    levels = triton_training.statsq_triton(moved, bits, group_size)
    assert_same_bits(levels.cpu(), statsq_reference(weight, bits, group_size))
    margin = triton_training.statsq_margin_triton(moved, bits, group_size)
    assert_same_bits(margin.cpu(), statsq_margin_reference(weight, bits, group_size))


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_statsq_gives_the_references_bits(
    kernels: ModuleType, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = heavy_tailed(shape[0], torch.Size(shape[1:]).numel()).to(dtype).view(shape)
    for turn, group_size in enumerate((-1, 1, 13, 64, 2000)):
        for bits in in_turn(BITS, turn):
            _check_statsq(device, weight, bits, group_size)


def test_rows_that_do_not_fit_registers_are_read_twice(kernels: ModuleType, device: str) -> None:
    weight = heavy_tailed(2, 20_001)
    _check_statsq(device, weight, 4, -1)
    _check_statsq(device, weight, 4, 10_000)


def test_unusual_weights_have_the_references_bits(
    kernels: ModuleType, device: str, dtype: torch.dtype
) -> None:
    weight = unusual(20, 70, dtype)
    for group_size in (-1, 8):
        _check_statsq(device, weight, 4, group_size)
    _check_statsq(device, strided(weight), 1, 32)


def _check_lsq(
    device: str, input: Tensor, grad: Tensor, scale: Tensor, bits: int, signed: bool, dim: int
) -> None:
    moved = (input.to(device), scale.to(device), bits, signed, dim)
    found = triton_training.lsq_triton(*moved)
    assert_same_bits(found.cpu(), lsq_reference(input, scale, bits, signed, dim))
    grad_input, grad_scale = triton_training.lsq_backward_triton(grad.to(device), *moved)
    expected, _ = lsq_backward_reference(grad, input, scale, bits, signed, dim)
    assert_same_bits(grad_input.cpu(), expected)
    wide = lsq_backward_reference(grad.float(), input.float(), scale, bits, signed, dim)[1]
    # Both sum in float32, up to 2048 terms in a tree or 64 in a row: as far from float64 as from each other.
    size = lsq_backward_reference(grad.float().abs(), input.float().abs(), scale, bits, True, dim)[1].abs()
    finite = torch.isfinite(wide)
    close = (grad_scale.cpu() - wide).abs() <= 1e-5 * (wide.abs() + size + scale.numel() ** -0.5)
    assert bool(close[finite].all())
    assert torch.equal(torch.isfinite(grad_scale.cpu()), finite)


@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_lsq_gives_the_references_bits(
    kernels: ModuleType, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    input, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for turn, dim in enumerate((None, *range(len(shape))), start=len(shape)):
        scale = 0.1 + torch.rand(1 if dim is None else shape[dim])
        for bits, signed in in_turn(FORMATS, turn):
            _check_lsq(device, input, grad, scale, bits, signed, -1 if dim is None else dim)


def test_unusual_inputs_have_the_references_bits(
    kernels: ModuleType, device: str, dtype: torch.dtype
) -> None:
    input, grad = unusual(20, 70, dtype), torch.randn(20, 70).to(dtype)
    for scale, (bits, signed) in zip((1.0, 0.0, -1.0, 3e38), FORMATS, strict=False):
        how = (torch.tensor([scale]), bits, signed, 0)
        moved = (input.to(device), how[0].to(device), *how[1:])
        assert_same_bits(triton_training.lsq_triton(*moved).cpu(), lsq_reference(input, *how))
        found, _ = triton_training.lsq_backward_triton(grad.to(device), *moved)
        assert_same_bits(found.cpu(), lsq_backward_reference(grad, input, *how)[0])


def test_lsq_of_nothing(kernels: ModuleType, device: str) -> None:
    input, scale = torch.empty(0, 5, device=device), torch.ones(5, device=device)
    assert triton_training.lsq_triton(input, scale, 4, True, 1).shape == (0, 5)
    grad_input, grad_scale = triton_training.lsq_backward_triton(input, input, scale, 4, True, 1)
    assert grad_input.shape == (0, 5) and not bool(grad_scale.any())


def test_gradients_are_the_same_every_time(kernels: ModuleType, device: str) -> None:
    input = torch.randn(300, 500, device=device)
    for scale, dim in ((torch.ones(1), 0), (torch.ones(500), 1), (torch.ones(300), 0)):
        how = (input, input, scale.to(device), 3, True, dim)
        first = triton_training.lsq_backward_triton(*how)[1]
        assert torch.equal(first, triton_training.lsq_backward_triton(*how)[1])


def test_plans_cover_every_value(kernels: ModuleType, device: str) -> None:
    from olive.kernels.lsq import VALUES, plan_lsq

    for outer in (1, 3, 5000):
        for scales in (1, 2, 700):
            for inner in (1, 2, 100, 5000):
                for backward in (False, True):
                    plan = plan_lsq(outer, scales, inner, backward)
                    assert plan.rows * plan.columns == outer * scales * inner
                    assert plan.block_rows * plan.block_columns == VALUES
                    assert plan.row_blocks * plan.block_rows * plan.loops >= plan.rows
                    assert plan.column_blocks * plan.block_columns >= plan.columns


def _check_oscillation(
    device: str, weight: Tensor, step: Tensor, offset: float, qmin: int, qmax: int
) -> None:
    codes = torch.randint(qmin, qmax + 1, weight.shape, dtype=torch.int8)
    direction = torch.randint(-1, 2, weight.shape, dtype=torch.int8)
    expected = (codes, direction, torch.rand(weight.shape))
    ours = [part.to(device).clone() for part in expected]
    for turn in range(2):
        moved = (weight.float() * (1 + 0.2 * turn)).to(weight.dtype)
        how = (offset, qmin, qmax, 0.02, 0.05)
        near = triton_training.oscillation_triton_(moved.to(device), step.to(device), *how, *ours)
        assert near.dtype == torch.bool
        assert torch.equal(near.cpu(), oscillation_reference_(moved, step, *how, *expected))
        for found, wanted in zip(ours[:2], expected[:2], strict=True):
            assert torch.equal(found.cpu(), wanted)
        assert_same_bits(ours[2].cpu(), expected[2])


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_oscillations_are_the_references(
    kernels: ModuleType, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    weight = (30 * heavy_tailed(rows, columns)).to(dtype).view(shape)
    cases = ((0.0, -2, 1), (0.5, -8, 7), (0.0, -128, 127), (0.5, 0, 15))
    for turn, groups in enumerate((0, 1, 2, -(-columns // 13))):
        if groups > 1 and -(-columns // -(-columns // groups)) != groups:
            continue
        step = 0.1 + torch.rand(rows if groups else 1, max(groups, 1))
        for case in in_turn(cases, turn):
            _check_oscillation(device, weight, step, *case)


def test_unusual_weights_oscillate_alike(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    step = torch.tensor(UNUSUAL).repeat(2)[:20, None]
    for offset, qmin, qmax in ((0.0, -4, 3), (0.5, 3, 9), (0.5, -9, -3)):
        _check_oscillation(device, unusual(20, 70, dtype), step, offset, qmin, qmax)
    _check_oscillation(device, heavy_tailed(2, 5000), torch.full((2, 1), 0.01), 0.0, -4, 3)
