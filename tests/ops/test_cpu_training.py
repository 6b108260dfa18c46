"""The CPU kernels of training give the reference's bits, and gradients of scales within float64's reach."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.ops import cpu_training
from olive.ops.lsq import LEAST_SCALE, integer_range, lsq_backward_reference, lsq_reference
from olive.ops.oscillation import oscillation_reference_
from olive.ops.statsq import statsq_codes_reference, statsq_margin_reference, statsq_reference
from tests.ops.cpu_cases import DTYPES, EACH_ISA, NEEDS_KERNELS, heavy_tailed, strided
from tests.ops.fixed_point import assert_same_bits

pytestmark = NEEDS_KERNELS
NAN, INF = float("nan"), float("inf")
# One value, less than a lane vector, whole ones, tails, more rows than a thread takes at once.
WEIGHTS = ((1, 1), (3, 7), (2, 32), (5, 3, 19), (20, 4113))
INPUTS = ((1,), (130,), (5, 16), (3, 7, 20), (2, 3, 5, 130), (1, 40_000), (700, 131))
UNUSUAL = (0.0, -0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 3e38, -3e38, 0.5, -0.5, 1.5, -1.5, 2.5, -0.25)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def unusual(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, ties, extremes and NaN in some rows."""
    weight = heavy_tailed(rows, columns).clone()
    values = torch.tensor(UNUSUAL)
    for row in range(0, rows, 2):
        count = min(columns, 1 + row % len(UNUSUAL))
        weight[row, :count] = values.roll(row)[:count]
    if rows > 1:
        weight[1] = 0
    return weight.to(dtype)


def check_statsq(weight: Tensor, bits: int, group_size: int, isa: str) -> None:
    """Levels, codes, scale and margins."""
    codes, scale = cpu_training.statsq_codes_cpu(weight, bits, group_size, isa)
    expected_codes, expected_scale = statsq_codes_reference(weight, bits, group_size)
    assert_same_bits(scale, expected_scale)
    assert torch.equal(codes, expected_codes)
    levels = cpu_training.statsq_cpu(weight, bits, group_size, isa)
    assert_same_bits(levels, statsq_reference(weight, bits, group_size))
    margin = cpu_training.statsq_margin_cpu(weight, bits, group_size, isa)
    assert_same_bits(margin, statsq_margin_reference(weight, bits, group_size))


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_statsq_gives_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    weight = heavy_tailed(shape[0], torch.Size(shape[1:]).numel()).to(dtype).view(shape)
    for bits, group_size in product((1, 2, 4, 8), (-1, 1, 13, 64)):
        if weight.numel() < 10_000 or (bits == 3 and group_size != 1):
            check_statsq(weight, bits, group_size, isa)
    check_statsq(weight, 3, -1, isa)


@EACH_ISA
def test_a_scale_is_off_by_an_ulp_at_most(isa: str) -> None:
    """Sums in float64 of another order may round to the other neighbour in float32, once in 2^29 or so."""
    for seed in range(5):
        weight = heavy_tailed(50, 1000, seed=seed)
        _, scale = cpu_training.statsq_codes_cpu(weight, 4, -1, isa)
        exact = 2 * weight.double().abs().mean(1, keepdim=True)
        assert bool(((scale.double() - exact).abs() <= exact * 2**-22).all())
        _, expected = statsq_codes_reference(weight, 4, -1)
        assert int((scale.view(torch.int32) - expected.view(torch.int32)).abs().max()) <= 1


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_weights_have_the_references_bits(dtype: torch.dtype, isa: str) -> None:
    weight = unusual(40, 70, dtype)
    for bits, group_size in product((1, 4, 8), (-1, 8, 32)):
        check_statsq(weight, bits, group_size, isa)


def check_lsq(
    input: Tensor, grad: Tensor, scale: Tensor, bits: int, signed: bool, dim: int, isa: str
) -> None:
    """Values, both gradients, and the scale's against float64."""
    how = (scale, bits, signed, dim)
    assert_same_bits(cpu_training.lsq_cpu(input, *how, isa), lsq_reference(input, *how))
    grad_input, grad_scale = cpu_training.lsq_backward_cpu(grad, input, *how, isa)
    expected, expected_scale = lsq_backward_reference(grad, input, *how)
    assert_same_bits(grad_input, expected)
    exact, size = _exact_grad_scale(grad, input, *how)
    finite = torch.isfinite(exact.float())
    assert torch.equal(torch.isfinite(grad_scale), finite)
    # Terms are float32 products of a float32 difference: an ulp each, plus the last rounding.
    tolerance = 2**-22 * size + 2**-23 * exact.abs() + 1e-44
    assert bool(((grad_scale.double() - exact).abs() <= tolerance)[finite].all())
    assert grad_scale.shape == expected_scale.shape and grad_scale.dtype == torch.float32


def _exact_grad_scale(
    grad: Tensor, input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int
) -> tuple[Tensor, Tensor]:
    """The gradient in float64, terms beyond float32 being infinite, and the sum of their magnitudes."""
    qmin, qmax = integer_range(bits, signed)
    shape = [1] * input.dim()
    shape[dim] = len(scale)
    steps = input.float() / scale.clamp(min=LEAST_SCALE).view(shape)
    inside = (steps >= qmin) & (steps <= qmax)
    sign = torch.where(steps >= 0, 1.0, -1.0)
    codes = sign if signed and bits == 1 else steps.clamp(qmin, qmax).round()
    terms = grad.double() * torch.where(inside, codes.double() - steps.double(), codes.double())
    terms = torch.where(terms.abs() > torch.finfo(torch.float32).max, terms * INF, terms)
    others = [one for one in range(input.dim()) if len(scale) == 1 or one != dim % input.dim()]
    norm = (qmax * max(1, input.numel() // max(1, len(scale)))) ** 0.5
    sums = [part.sum(others) if others else part for part in (terms, terms.abs())]
    return sums[0].view(-1) / norm, sums[1].view(-1) / norm


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_lsq_gives_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    input, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    formats = [(1, True), (1, False), (2, True), (4, False), (8, True), (8, False)]
    for dim in (None, *range(len(shape))):
        scale = 0.1 + torch.rand(1 if dim is None else shape[dim])
        for bits, signed in formats if input.numel() < 10_000 else formats[2:4]:
            check_lsq(input, grad, scale, bits, signed, -1 if dim is None else dim, isa)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_inputs_have_the_references_bits(dtype: torch.dtype, isa: str) -> None:
    input, grad = unusual(40, 70, dtype), unusual(40, 70, dtype).flip(0)
    scales = [torch.ones(1), torch.zeros(1), torch.tensor([-1.0]), torch.tensor([1e-5]), torch.tensor([3e38])]
    for scale, (bits, signed) in product(scales, ((1, True), (1, False), (3, True), (4, False))):
        check_lsq(input, grad, scale, bits, signed, 0, isa)
    for dim in (0, 1):
        scale = unusual(1, (40, 70)[dim], torch.float32)[0]
        check_lsq(input, grad, scale, 3, True, dim, isa)


@EACH_ISA
def test_zeros_keep_their_sign(isa: str) -> None:
    input = torch.tensor([0.0, -0.0, -0.3, 0.3, -0.5, 0.5])
    for signed in (True, False):
        found = cpu_training.lsq_cpu(input, torch.ones(1), 4, signed, 0, isa)
        assert_same_bits(found, lsq_reference(input, torch.ones(1), 4, signed, 0))


@EACH_ISA
def test_empty_inputs(isa: str) -> None:
    for shape, dim, size in (((0,), 0, 1), ((0, 5), 1, 5), ((3, 0), 0, 3), ((3, 0), 1, 0), ((2, 0, 4), 2, 4)):
        input, scale = torch.empty(shape), torch.ones(size)
        assert cpu_training.lsq_cpu(input, scale, 4, True, dim, isa).shape == shape
        grad_input, grad_scale = cpu_training.lsq_backward_cpu(input, input, scale, 4, True, dim, isa)
        assert grad_input.shape == shape
        assert torch.equal(grad_scale, torch.zeros(size))


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    grad, input = torch.randn(700, 4000), torch.randn(700, 4000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for scale, dim in (
            (torch.tensor([0.3]), 0),
            (torch.full((700,), 0.3), 0),
            (torch.full((4000,), 0.3), 1),
        ):
            results.append(cpu_training.lsq_backward_cpu(grad, input, scale, 3, True, dim)[1])
    for turn in range(3):
        assert torch.equal(results[turn], results[turn + 3])
        assert torch.equal(results[turn], results[turn + 6])


def check_oscillation(weight: Tensor, step: Tensor, offset: float, qmin: int, qmax: int, isa: str) -> None:
    """Three calls with weights that move, state and answer."""
    codes = torch.randint(qmin, qmax + 1, weight.shape, dtype=torch.int8)
    direction = torch.randint(-1, 2, weight.shape, dtype=torch.int8)
    ours = (codes.clone(), direction.clone(), torch.rand(weight.shape))
    expected = tuple(part.clone() for part in ours)
    for turn in range(3):
        moved = (weight.float() * (1 + 0.2 * turn)).to(weight.dtype)
        how = (moved, step, offset, qmin, qmax, 0.02, 0.05)
        near = cpu_training.oscillation_cpu_(*how, *ours, isa)
        assert torch.equal(near, oscillation_reference_(*how, *expected))
        for found, wanted in zip(ours[:2], expected[:2], strict=True):
            assert torch.equal(found, wanted)
        assert_same_bits(ours[2], expected[2])


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_oscillations_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    weight = (30 * heavy_tailed(rows, columns)).to(dtype).view(shape)
    for groups in (0, 1, 2, -(-columns // 13)):
        if groups > 1 and -(-columns // -(-columns // groups)) != groups:
            continue
        step = 0.1 + torch.rand(rows if groups else 1, max(groups, 1))
        for offset, qmin, qmax in ((0.0, -2, 1), (0.5, -8, 7), (0.0, -128, 127), (0.5, 0, 15)):
            check_oscillation(weight, step, offset, qmin, qmax, isa)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_weights_oscillate_alike(dtype: torch.dtype, isa: str) -> None:
    weight = unusual(40, 70, dtype)
    step = torch.tensor(UNUSUAL).repeat(5)[:40, None]
    for offset, qmin, qmax in ((0.0, -4, 3), (0.5, 3, 9), (0.5, -9, -3)):
        check_oscillation(weight, step, offset, qmin, qmax, isa)


@EACH_ISA
def test_a_distance_at_the_boundary_is_within_it(isa: str) -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3, 1.1, -0.1, -0.2]])
    for boundary in (0.1, 0.2, float(weight[0, 3] - 1)):
        state = [torch.zeros(1, 6, dtype=torch.int8), torch.zeros(1, 6, dtype=torch.int8), torch.zeros(1, 6)]
        how = (weight, torch.ones(1, 1), 0.0, -4, 3, 0.1, boundary, *state)
        assert torch.equal(cpu_training.oscillation_cpu_(*how, isa), oscillation_reference_(*how))


def test_operators_run_the_kernels_and_take_any_strides() -> None:
    weight = heavy_tailed(9, 50)
    spread = strided(weight)
    assert_same_bits(ops.statsq(spread, 3, 16), cpu_training.statsq_cpu(weight, 3, 16))
    assert torch.equal(ops.statsq_codes(spread, 3, 16)[0], cpu_training.statsq_codes_cpu(weight, 3, 16)[0])
    assert_same_bits(ops.statsq_margin(spread, 3, 16), cpu_training.statsq_margin_cpu(weight, 3, 16))
    scale = strided(torch.full((50,), 0.01))
    assert_same_bits(ops.lsq(spread, scale, 3, True, 1), lsq_reference(weight, scale, 3, True, 1))
    found = torch.ops.olive.lsq_backward(spread, spread, scale, 3, True, 1)
    expected = cpu_training.lsq_backward_cpu(weight, weight, scale.contiguous(), 3, True, 1)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    for name in ("statsq", "statsq_codes", "statsq_margin", "lsq", "lsq_backward", "oscillation_"):
        assert "CPU: registered" in torch._C._dispatch_dump(f"olive::{name}")


def test_bindings_reject_what_would_leave_memory() -> None:
    from olive.ops.cpu import cpu_kernels

    kernels, data = cpu_kernels(), torch.zeros(16)
    at = data.data_ptr()
    with pytest.raises(ValueError, match="width: expected 1 to K, got 17"):
        kernels.statsq(at, 0, 1, 16, 17, 4, at, 0, 0, 0, "")
    with pytest.raises(ValueError, match="bits: expected 1 to 8, got 9"):
        kernels.statsq(at, 0, 1, 16, 16, 9, at, 0, 0, 0, "")
    with pytest.raises(ValueError, match="shape: expected outer, size and inner from 0"):
        kernels.lsq(at, 0, -1, 1, 16, at, -8, 7, False, at, "")
    with pytest.raises(ValueError, match="shape: expected fewer values"):
        kernels.lsq(at, 0, 2**40, 2**40, 2**40, at, -8, 7, False, at, "")
    with pytest.raises(ValueError, match="qmin, qmax: expected a range of 8 bits"):
        kernels.lsq(at, 0, 1, 1, 16, at, 7, 7, False, at, "")
    with pytest.raises(ValueError, match="grad: expected an address, got 0"):
        kernels.lsq_backward(0, at, 0, 1, 1, 16, at, -8, 7, False, at, at, "")
    with pytest.raises(ValueError, match="qmin, qmax: expected a range of int8"):
        kernels.oscillation(at, 0, 1, 16, 16, at, True, 0.0, -8, 128, 0.1, 0.9, 0.1, at, at, at, at, "")
