"""`ovp_linear_triton` against float64, exactly where float32 holds the result exactly.

The bound of a float32 sum of K products, taken in any order by units that may cut off bits, is
K 2^-23 sum |x w|; rounding to the output's type adds half a unit in its last place.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops.reference import ovp_decode_reference
from tests.kernels.conftest import in_turn
from tests.ops.cpu_cases import BOOKS, random_weight, strided

# One row; few; the edges of a block of 16, 32, 64 and 128; past them.
ROWS = (1, 2, 16, 17, 33, 65, 130)
# (N, K): one; odd; a ragged second block; several blocks of columns, the last one ragged; split columns.
SHAPES = ((1, 1), (3, 5), (70, 131), (65, 300), (9, 1100))


def _bias(size: int, turn: int) -> Tensor | None:
    kinds = (None, torch.float32, torch.float16, torch.bfloat16)
    kind = kinds[turn % 4]
    return None if kind is None else torch.linspace(-1, 2, size).to(kind)


def _linear(
    kernels: ModuleType,
    device: str,
    x: Tensor,
    stored: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    group: int,
) -> Tensor:
    tensors = [tensor.to(device) for tensor in stored]
    bias = None if bias is None else bias.to(device)
    return kernels.ovp_linear_triton(x.to(device), *tensors, bias, stored[0].shape[0], group).cpu()


def check_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that a product is as near to float64 as its sums' type allows."""
    assert found.dtype == x.dtype
    assert found.shape == (*x.shape[:-1], weight.shape[0])
    offset = torch.zeros(()) if bias is None else bias
    exact = x.double() @ weight.double().t() + offset.double()
    terms = x.double().abs() @ weight.double().abs().t() + offset.double().abs()
    info = torch.finfo(x.dtype)
    sums = (x.shape[-1] + 2) * 2.0**-23 * terms
    rounding = (exact.abs() + sums) * info.eps / 2 + info.smallest_normal * info.eps
    difference = (found.double() - exact).abs()
    assert bool((difference <= sums + rounding).all()), (difference - sums - rounding).max()


@pytest.mark.parametrize("rows", ROWS)
def test_output_is_within_the_rounding_of_float32(
    kernels: ModuleType, device: str, rows: int, dtype: torch.dtype
) -> None:
    for turn, (outputs, columns) in enumerate(SHAPES, ROWS.index(rows)):
        for group_size in in_turn(GROUP_SIZES, turn):
            stored = random_weight(outputs, columns, group_size, list(BOOKS)[(turn + rows) % len(BOOKS)])
            weight = ovp_decode_reference(*stored, columns, group_size, torch.float32)
            x = torch.randn(rows, columns).to(dtype)
            bias = _bias(outputs, turn)
            check_product(_linear(kernels, device, x, stored, bias, group_size), x, weight, bias)


@pytest.mark.parametrize("book", BOOKS)
def test_unit_vectors_give_the_weight_rounded_once(
    kernels: ModuleType, device: str, book: str, dtype: torch.dtype
) -> None:
    """Scale times level is exact in float32, so nothing is rounded before the output is."""
    columns = 133
    for group_size in in_turn(GROUP_SIZES, list(BOOKS).index(book)):
        stored = random_weight(5, columns, group_size, book)
        weight = ovp_decode_reference(*stored, columns, group_size, dtype)
        units = torch.eye(columns)[[0, 1, 2, 63, 64, 131, 132]].to(dtype)
        found = _linear(kernels, device, units, stored, None, group_size)
        assert torch.equal(found, (units.float() @ weight.float().t()).to(dtype))
        single = _linear(kernels, device, units[-1], stored, None, group_size)
        assert torch.equal(single, weight[:, -1])


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_without_nan_are_not_touched_by_it(
    kernels: ModuleType, device: str, rows: int, dtype: torch.dtype
) -> None:
    stored = random_weight(20, 300, 64, "adaptive")
    x = torch.randn(rows, 300).to(dtype)
    clean = _linear(kernels, device, x, stored, None, 64)
    x[0, 7], x[-1, 299] = float("nan"), float("inf")
    found = _linear(kernels, device, x, stored, None, 64)
    assert bool(found[0].isnan().all())
    assert not bool(found[-1].isfinite().any())
    assert torch.equal(found[1:-1], clean[1:-1])
    single = _linear(kernels, device, x[0], stored, None, 64)
    assert bool(single.isnan().all())


def test_any_leading_shape_and_strides(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    stored = random_weight(6, 45, 32, "adaptive")
    weight = ovp_decode_reference(*stored, 45, 32, torch.float32)
    spread = tuple(strided(tensor) for tensor in stored)
    bias = strided(torch.linspace(-1, 1, 6))
    for shape in ((45,), (1, 45), (2, 3, 45), (0, 45), (2, 0, 45)):
        x = torch.randn(shape).to(dtype)
        check_product(_linear(kernels, device, strided(x), spread, bias, 32), x, weight, bias)
    x = torch.randn(45, 4).to(dtype).t()
    check_product(_linear(kernels, device, x, stored, None, 32), x, weight, None)


def test_split_columns_give_the_same_bits_every_time(
    kernels: ModuleType, device: str, dtype: torch.dtype
) -> None:
    from olive.kernels.ovp_linear import plan_linear

    assert plan_linear(5, 30, 1600, 64, dtype).splits > 1
    stored = random_weight(30, 1600, 64, "adaptive")
    x = torch.randn(5, 1600).to(dtype)
    first = _linear(kernels, device, x, stored, None, 64)
    assert torch.equal(_linear(kernels, device, x, stored, None, 64), first)


def test_plans_cover_every_column_within_one_group(kernels: ModuleType, device: str) -> None:
    from olive.kernels.ovp_linear import MAX_SPLITS, plan_linear

    for dtype in (torch.float16, torch.float32):
        for rows in (2, 16, 17, 64, 65, 5000):
            for outputs in (1, 64, 4096, 152064):
                for columns in (1, 127, 4096, 14336):
                    for group_size in GROUP_SIZES:
                        plan = plan_linear(rows, outputs, columns, group_size, dtype)
                        width = plan.block_k * plan.blocks_per_split(columns)
                        assert group_size <= 0 or group_size % plan.block_k == 0
                        assert 1 <= plan.splits <= MAX_SPLITS
                        assert width * (plan.splits - 1) < columns <= width * plan.splits


@pytest.mark.parametrize("rows", [1, 2])
def test_offsets_past_two_to_the_31_are_right(kernels: ModuleType, device: str, rows: int) -> None:
    """A weight of 2.2 GB of codes, zeros but for its last rows."""
    if device == "cpu":
        pytest.skip("too slow under the interpreter")
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs 4 GiB of free GPU memory")
    outputs, columns = 67_000, 65_536
    codes, scale, table = random_weight(3, columns, -1, "adaptive")
    wide = torch.zeros(outputs, columns // 2, dtype=torch.uint8, device=device)
    wide[-3:] = codes.to(device)
    wide_scale = torch.full((outputs, 1), 0x3F80, dtype=torch.int16, device=device)
    wide_scale[-3:] = scale.to(device)
    x = torch.randn(rows, columns).half()
    found = kernels.ovp_linear_triton(x.to(device), wide, wide_scale, table.to(device), None, outputs, -1)
    assert bool((found[:, :-3] == 0).all())
    weight = ovp_decode_reference(codes, scale, table, columns, -1, torch.float32)
    check_product(found[:, -3:].cpu(), x, weight, None)


def test_a_cuda_graph_replays_the_product(kernels: ModuleType, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    stored = [tensor.to(device) for tensor in random_weight(70, 1600, 128, "adaptive")]
    for rows in (1, 5):
        x = torch.randn(rows, 1600, device=device).half()
        expected = kernels.ovp_linear_triton(x, *stored, None, 70, 128)  # compiles
        graph = torch.cuda.CUDAGraph()
        static = torch.zeros_like(x)
        with torch.cuda.graph(graph):
            out = kernels.ovp_linear_triton(static, *stored, None, 70, 128)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)
