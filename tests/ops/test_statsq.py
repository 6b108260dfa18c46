"""StatsQ: its levels, one bit, bfloat16, groups, and a gradient that passes straight through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive import ops
from tests.ops.cpu_cases import DTYPES


def _weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _by_the_paper(weight: Tensor, bits: int) -> Tensor:
    """The paper's formula in float64, per output channel; for two bits and more."""
    wide = weight.double().flatten(1)
    scale = 2 * wide.abs().mean(1, keepdim=True)
    half = 2 ** (bits - 1)
    rounded = ((wide / scale).clamp(-1, 1 - 1e-6) * half - 0.5).round()
    return ((rounded + 0.5) / half * scale).view(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(7, 33), (3, 4, 3, 5), (1, 2)])
def test_levels_are_the_papers(bits: int, shape: tuple[int, ...]) -> None:
    weight = _weight(*shape)
    found = ops.statsq(weight, bits, -1)
    assert found.shape == weight.shape and found.dtype == weight.dtype
    assert torch.allclose(found.double(), _by_the_paper(weight, bits), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_level_is_an_odd_multiple_of_half_a_step(bits: int, dtype: torch.dtype) -> None:
    weight = (50 * _weight(5, 300)).to(dtype)
    codes, scale = ops.statsq_codes(weight, bits, -1)
    half = 2 ** (bits - 1)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape == (5, 1)
    assert int(codes.min()) == -half and int(codes.max()) == half - 1
    assert torch.allclose(scale, 2 * weight.float().abs().mean(1, keepdim=True), rtol=1e-5)
    levels = ((2 * codes.float() + 1) / (2 * half) * scale).to(dtype)
    assert torch.equal(ops.statsq(weight, bits, -1), levels)


def test_one_bit_is_the_sign_times_the_mean() -> None:
    weight = _weight(4, 64)
    expected = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(1, keepdim=True)
    assert torch.allclose(ops.statsq(weight, 1, -1), expected, rtol=1e-6)


@pytest.mark.parametrize("group_size", [1, 8, 13, 40])
def test_groups_are_quantized_on_their_own(group_size: int) -> None:
    weight = _weight(3, 40)
    found = ops.statsq(weight, 3, group_size)
    for start in range(0, 40, group_size):
        part = slice(start, min(start + group_size, 40))
        assert torch.allclose(found[:, part], ops.statsq(weight[:, part], 3, -1), rtol=1e-6)
    codes, scale = ops.statsq_codes(weight, 3, group_size)
    assert codes.shape == (3, 40) and scale.shape == (3, -(-40 // group_size))


def test_zeros_stay_zeros() -> None:
    weight = _weight(3, 16)
    weight[1] = 0
    found = ops.statsq(weight, 2, -1)
    assert not bool(found[1].any()) and bool(torch.isfinite(found).all())


def test_a_nan_or_an_infinity_spoils_its_group_and_no_code() -> None:
    weight = _weight(3, 32)
    weight[0, 3], weight[1, 20] = float("nan"), float("inf")
    found = ops.statsq(weight, 3, 16)
    assert torch.equal(found[0].isnan(), torch.arange(32) < 16)
    assert bool(found[1, 16:].isinf().all()) and bool(torch.isfinite(found[1, :16]).all())
    codes, _ = ops.statsq_codes(weight, 3, 16)
    assert codes[0, 3] == codes[1, 20] == 0
    assert int(codes.min()) >= -4 and int(codes.max()) <= 3


def test_the_scale_does_not_depend_on_the_order_of_the_sum() -> None:
    weight = torch.randn(4, 100_000)
    _, scale = ops.statsq_codes(weight, 4, -1)
    exact = (2 * weight.double().abs().mean(1, keepdim=True)).float()
    assert torch.allclose(scale, exact, rtol=2**-23)
    _, turned = ops.statsq_codes(weight.flip(1), 4, -1)
    assert torch.equal(scale, turned)


def test_the_gradient_passes_straight_through() -> None:
    weight = (3 * _weight(6, 20)).requires_grad_()
    grad = _weight(6, 20, seed=1)
    (found,) = torch.autograd.grad(ops.statsq(weight, 2, -1), weight, grad)
    assert torch.equal(found, grad)  # clipped weights too


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_margins_are_distances_to_the_nearest_change_of_code(bits: int, group_size: int) -> None:
    weight = 3 * _weight(5, 64)
    margin = ops.statsq_margin(weight, bits, group_size)
    codes, scale = ops.statsq_codes(weight, bits, group_size)
    width = 64 if group_size < 0 else group_size
    step = scale.repeat_interleave(width, dim=1) / 2 ** (bits - 1)
    assert margin.dtype == torch.float32 and margin.shape == weight.shape
    half = 2 ** (bits - 1)

    def code_of(value: Tensor) -> Tensor:  # under the scales of the weight
        return (value / step).floor().clamp(-half, half - 1)

    inside, past = 0.99 * margin * step - 1e-6, 1.01 * margin * step + 1e-6
    for sign in (-1, 1):
        assert torch.equal(code_of(weight + sign * inside), codes.float())
    changed = (code_of(weight + past) != codes) | (code_of(weight - past) != codes)
    assert bool(changed.all())


def test_few_weights_are_within_the_usual_margin() -> None:
    margin = ops.statsq_margin(_weight(64, 4096), 2, -1)
    assert 0.005 < float((margin <= 0.005).double().mean()) < 0.012  # Gaussian: 0.8 to 0.9 %


def test_as_an_operator() -> None:
    weight = _weight(6, 20).requires_grad_()
    torch.library.opcheck(torch.ops.olive.statsq.default, (weight, 3, 8))
    torch.library.opcheck(torch.ops.olive.statsq_codes.default, (weight.detach(), 3, -1))
    torch.library.opcheck(torch.ops.olive.statsq_margin.default, (weight.detach(), 3, 8))
    strided = _weight(20, 6).T
    assert torch.equal(ops.statsq(strided, 3, -1), ops.statsq(strided.contiguous(), 3, -1))


def test_bad_arguments() -> None:
    weight = _weight(4, 8)
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 9"):
        ops.statsq(weight, 9, -1)
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 0"):
        ops.statsq_codes(weight, 0, -1)
    with pytest.raises(ValueError, match=r"group_size: expected -1 per channel, or columns, got 0"):
        ops.statsq(weight, 4, 0)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, \.\.\.\], not empty, got \(8,\)"):
        ops.statsq(weight[0], 4, -1)
    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16, got torch\.float64"):
        ops.statsq(weight.double(), 4, -1)
