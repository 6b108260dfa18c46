"""`ovp_quantize_triton` chooses the reference's scales and writes its bytes.

The reference runs on the CPU, where it is the definition: on a GPU, Torch divides by a number through its
reciprocal and adds rows in another order.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, PAIRINGS
from olive.formats.ovp4 import PairTables
from olive.ops.reference import ordered_sum, ovp_quantize_reference
from tests.kernels.conftest import in_turn
from tests.ops.cpu_cases import BOOKS, heavy_tailed, strided

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = ([0.5, 1.0], [0.7])  # few, because the interpreter takes a millisecond per step and candidate
SHAPES = ((2, 141), (1, 1), (3, 75))


def _importance(columns: int) -> Tensor:
    importance = torch.rand(columns)
    importance[::5] = 0.0
    return importance


def _check(
    kernels: ModuleType,
    device: str,
    weight: Tensor,
    book: str,
    group_size: int,
    pairing: str = "optimal",
    grids: tuple[list[float], list[float]] = GRIDS,
    importance: Tensor | None = None,
) -> None:
    table = BOOKS[book].tensor()
    codes, scale = ovp_quantize_reference(weight, table, group_size, pairing, *grids, importance)
    found_codes, found_scale = kernels.ovp_quantize_triton(
        weight.to(device),
        table.to(device),
        group_size,
        pairing,
        *grids,
        None if importance is None else importance.to(device),
    )
    assert torch.equal(found_scale.cpu(), scale)
    assert torch.equal(found_codes.cpu(), codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search_equals_the_reference(
    kernels: ModuleType, device: str, shape: tuple[int, int], group_size: int
) -> None:
    rows, columns = shape
    turn = SHAPES.index(shape) + GROUP_SIZES.index(group_size)
    for book in in_turn(list(BOOKS), turn):
        weight = heavy_tailed(rows, columns).to(FLOATS[turn % 3])
        importance = _importance(columns) if turn % 4 == 1 else None
        _check(kernels, device, weight, book, group_size, PAIRINGS[turn % 2], importance=importance)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_importance_decides_alike(kernels: ModuleType, device: str, group_size: int) -> None:
    for largest in in_turn([1.0, 2.0**64], group_size):
        importance = _importance(75) * largest
        _check(kernels, device, heavy_tailed(3, 75), "adaptive", group_size, importance=importance)


def test_sums_have_every_bit_of_the_ordered_sum(kernels: ModuleType, device: str) -> None:
    """A choice between candidates rarely shows the last bits of their errors; the sums themselves do.

    1024 columns are summed in float32; here are a whole chunk and an odd rest.
    """
    from olive.kernels.per_tensor import row_errors_kernel, row_stats_kernel

    rows, columns = 3, 1024 + 37
    steps = -(-columns // 32)
    weight, book, scale = heavy_tailed(rows, columns), BOOKS["adaptive"], torch.tensor([2.0**-9, 2.0**-10])
    padded = torch.nn.functional.pad(weight, (0, 1))
    squares = padded * padded
    largest = torch.empty(rows, device=device)
    energy = torch.empty(rows, dtype=torch.float64, device=device)
    shape = (rows, columns, steps)
    options = {"BLOCK": 4, "enable_fp_fusion": False}
    row_stats_kernel[(1,)](weight.to(device), largest, energy, *shape, **options)
    assert torch.equal(largest.cpu(), weight.abs().amax(1))
    assert torch.equal(energy.cpu(), ordered_sum(squares[:, 0::2] + squares[:, 1::2]))

    tables = PairTables(book, torch.device("cpu"))
    pair_error = tables.encode_pair_rule(padded / scale[0], "optimal")[1]
    plain_error = tables.encode_plain(padded / scale[1])[1]
    errors = torch.empty(rows, 2, dtype=torch.float64, device=device)
    tensors = [tensor.to(device) for tensor in (weight, book.tensor(), scale)]
    row_errors_kernel[(1, 2)](
        *tensors[:2], None, tensors[2], errors, rows, columns, 2, 1, steps, OPTIMAL=True, **options
    )
    assert torch.equal(errors.cpu(), ordered_sum(torch.stack((pair_error, plain_error), 1)))


def test_rows_longer_than_a_chunk_are_searched_alike(kernels: ModuleType, device: str) -> None:
    for group_size in in_turn([-1, 0], 0):
        _check(kernels, device, heavy_tailed(2, 1024 + 37), "int4", group_size, grids=([0.9], []))


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_unusual_values_decide_alike(kernels: ModuleType, device: str, group_size: int) -> None:
    """One weight with rows of every kind; per tensor, one weight of each kind."""
    columns = 40
    tail = heavy_tailed(1, columns)
    border = torch.full((1, columns), 2.0**-61)
    border[0, 0] = 2.0**-60
    outlier = tail.clone()
    outlier[0, 20] = 80.0
    rows = [
        torch.zeros(1, columns),
        torch.ones(1, columns),
        torch.arange(columns)[None] / 4.0 - 8,  # ties, with scales that are powers of two
        border,  # 2^-60: not yet a group of zeros; the rest of the row is, in groups of 32
        border * (1 - 2.0**-20),
        outlier,
        tail * 1e-30,
        tail * 1e-38,
        tail * 1e17,
        tail * 1e38,
    ]
    weights = [torch.cat(rows)]
    if group_size == 0:
        weights = rows[::3] if device == "cpu" else rows
    for weight in weights:
        _check(kernels, device, weight, "adaptive", group_size)


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("grids", [([1.0], []), ([], [0.8]), ([2.5, 1.0, 1.0], [3.0])], ids=str)
def test_every_kind_of_grid_is_searched_alike(
    kernels: ModuleType, device: str, grids: tuple[list[float], list[float]], group_size: int
) -> None:
    _check(kernels, device, heavy_tailed(2, 67), "adaptive", group_size, grids=grids)


def test_plain_multiples_mean_nothing_without_plain_levels(kernels: ModuleType, device: str) -> None:
    for group_size in (0, 32):
        _check(kernels, device, heavy_tailed(2, 40), "int4", group_size, grids=([0.1], [1.0]))


def test_inputs_need_not_be_contiguous(kernels: ModuleType, device: str) -> None:
    weight, importance, table = heavy_tailed(3, 45), torch.rand(45), BOOKS["adaptive"].tensor()
    for group_size in (0, 32):
        expected = ovp_quantize_reference(weight, table, group_size, "optimal", *GRIDS, importance)
        for view in in_turn([strided(weight), weight.t().contiguous().t()], group_size):
            tensors = [tensor.to(device) for tensor in (view, strided(table), strided(importance))]
            found = kernels.ovp_quantize_triton(*tensors[:2], group_size, "optimal", *GRIDS, tensors[2])
            assert torch.equal(found[0].cpu(), expected[0])
            assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_a_value_that_is_not_finite_is_rejected(kernels: ModuleType, device: str, group_size: int) -> None:
    weight = heavy_tailed(2, 45).clone()
    weight[1, 44] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        kernels.ovp_quantize_triton(
            weight.to(device), BOOKS["int4"].tensor().to(device), group_size, "optimal", [1.0], [], None
        )


def test_a_whole_search_equals_the_reference(kernels: ModuleType, device: str) -> None:
    """The grids that quantizing uses, over more groups than a program holds; too slow to interpret."""
    from olive.ptq.grids import PAIR_GRID, PLAIN_GRID

    if device == "cpu":
        pytest.skip("too slow under the interpreter")
    weight = heavy_tailed(40, 3000).to(torch.bfloat16)
    for group_size in GROUP_SIZES:
        for importance in (None, _importance(3000)):
            grids = (list(PAIR_GRID), list(PLAIN_GRID))
            _check(kernels, device, weight, "adaptive", group_size, grids=grids, importance=importance)
