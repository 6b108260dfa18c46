"""Encode and scale search on the CUDA kernels: the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, Codebook, scale_shape
from olive.ops import reference
from olive.ptq.grids import PAIR_GRID, PLAIN_GRID, WIDE_PAIR_GRID
from tests.cuda import emulated
from tests.cuda.module import NEEDS_COMPILER, SCHEDULES, emulated_cuda
from tests.ops import cpu_cases
from tests.ops.cpu_cases import DTYPES, heavy_tailed
from tests.ops.test_cpu_encode import VALUES

pytestmark = NEEDS_COMPILER
GRIDS = ([0.5, 0.75, 1.0], [0.6, 0.9])
PAIRINGS = ("optimal", "paper")
# One value; a pair; an odd K; ragged groups; 16 bytes at a time; past a chunk of 1024 columns.
SHAPES = ((1, 1), (2, 2), (5, 7), (9, 130), (3, 256), (2, 1100))
# Beside the others': the largest levels there are, and plain levels without positive ones.
BOOKS = {
    **cpu_cases.BOOKS,
    "widest": Codebook(
        "widest",
        (0, 1, 2, 100, 200, 246, 247, 248),
        (0, 249, 250, 251, 252, 253, 254, 255),
        (*range(-127, -112), 0),
    ),
}


def _check(
    weight: Tensor,
    group_size: int,
    book: str,
    pairing: str,
    grids: tuple[list[float], list[float]] = GRIDS,
    importance: Tensor | None = None,
) -> None:
    """Search as the reference does, and encode with the scales found."""
    table = BOOKS[book].tensor()
    codes, scale = reference.ovp_quantize_reference(weight, table, group_size, pairing, *grids, importance)
    found = emulated.quantize(weight, table, group_size, pairing, *grids, importance)
    assert torch.equal(found[1], scale)
    assert torch.equal(found[0], codes)
    if importance is None:
        assert torch.equal(emulated.encode(weight, scale, table, group_size, pairing), codes)


def _importance(columns: int) -> Tensor:
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(1))
    importance[::5] = 0.0
    return importance


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_search_and_encode_equal_the_reference(group_size: int, book: str) -> None:
    for turn, shape in enumerate(SHAPES, start=GROUP_SIZES.index(group_size) + list(BOOKS).index(book)):
        emulated.steer(schedule=turn % 3)
        importance = _importance(shape[1]) if turn % 4 == 1 else None
        weight = heavy_tailed(*shape).to(DTYPES[turn % 3])
        _check(weight, group_size, book, PAIRINGS[turn // 3 % 2], importance=importance)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_pairing_and_importance_equals_the_reference(dtype: torch.dtype, pairing: str) -> None:
    emulated.steer(schedule=7)
    weight = heavy_tailed(5, 141).to(dtype)
    for group_size in (-1, 0, 64):
        for importance in (None, _importance(141)):
            _check(weight, group_size, "adaptive", pairing, importance=importance)


@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("values", VALUES)
def test_unusual_values_equal_the_reference(values: str, group_size: int) -> None:
    """Zeros, all alike, values on thresholds, outliers, the ends of float32, groups about 2^-60."""
    emulated.steer()
    dtype = torch.float16 if values == "large" else torch.bfloat16 if values == "ties" else torch.float32
    for book in ("int4", "adaptive"):
        for pairing in PAIRINGS:
            _check(VALUES[values](4, 75).to(dtype), group_size, book, pairing)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_default_grids_equal_the_reference(group_size: int, schedule: int) -> None:
    """More candidates than lanes of half a warp, and than a block takes in one walk along a row."""
    emulated.steer(schedule)
    pair_grid = WIDE_PAIR_GRID if group_size <= 0 else PAIR_GRID
    _check(heavy_tailed(3, 200), group_size, "adaptive", "optimal", (list(pair_grid), list(PLAIN_GRID)))


@pytest.mark.parametrize("grids", [([1.0], []), ([], [0.8, 0.008]), ([2.5, 1.0, 0.1], [3.0, 0.2])], ids=str)
def test_every_kind_of_grid_equals_the_reference(grids: tuple[list[float], list[float]]) -> None:
    emulated.steer()
    for group_size in GROUP_SIZES:
        for book in ("adaptive", "widest"):
            _check(heavy_tailed(5, 99), group_size, book, "optimal", grids)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_of_equal_candidates_the_earliest_wins(group_size: int) -> None:
    """A weight that many scales store without error; the first such candidate is anywhere in the list."""
    emulated.steer(schedule=1)
    weight = torch.full((2, 140), 7.0)
    multiples = [0.9, 1.1, 1.3, 7.0, 3.5, 1.75, 1.0, 3.5]
    for turn in (0, 5, 17):
        grid = [0.9] * turn + [multiples[(turn + i) % 8] for i in range(20)]
        _check(weight, group_size, "int4", "optimal", (grid, []))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_sums_in_another_order_would_choose_otherwise(group_size: int) -> None:
    """Of values in opposite pairs a plain scale and its negative make the same error: rounding decides."""
    emulated.steer(schedule=7)
    width = 2100 if group_size <= 0 else group_size
    for _ in range(8 if group_size == 0 else 1):
        half = torch.randn(2 if group_size == 0 else 24, width // 2)
        group = torch.cat((half, -half), dim=1)[:, torch.randperm(width)]
        _check(group, group_size, "adaptive", "optimal", ([], [0.8]))


@pytest.mark.parametrize("book", BOOKS)
def test_on_both_sides_of_every_threshold_encode_equals_the_reference(book: str) -> None:
    """Every multiple of 1/2 and its neighbours in float32, beside values of every kind."""
    emulated.steer()
    half = torch.arange(-520, 521, dtype=torch.float32) / 2
    around = torch.cat((half, half.nextafter(half - 1), half.nextafter(half + 1)))
    pairs = torch.cartesian_prod(around, torch.tensor([0.0, -0.0, 1e-30, 20.0, -300.0, 1e38]))
    values = torch.cat((pairs, pairs.flip(1))).flatten()
    rows = torch.cat((values, values.new_zeros(-len(values) % 256))).view(-1, 256)
    weight = torch.cat((rows, rows, 2 * rows, 2 * rows))
    scale = torch.tensor([0x3F80, 0x3F81, 0x4000, 0x4001], dtype=torch.int16)  # 1 and 2, under both rules
    scale = scale.repeat_interleave(len(rows))[:, None]
    table = BOOKS[book].tensor()
    for pairing in PAIRINGS:
        expected = reference.ovp_encode_reference(weight, scale, table, -1, pairing)
        assert torch.equal(emulated.encode(weight, scale, table, -1, pairing), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_encode_with_any_scale_equals_the_reference(pairing: str, group_size: int) -> None:
    """Scales far off, negative ones, and the rule bit with every codebook: some have no plain levels."""
    emulated.steer(schedule=7)
    for rows, columns in ((6, 165), (20, 168)):
        shape = scale_shape(rows, columns, group_size)
        values = 1e-3 * torch.exp2(30 * torch.rand(shape) - 15) * (torch.randint(2, shape) * 2 - 1)
        scale = (values.view(torch.int32) >> 16).short() & ~1 | torch.randint(2, shape).short()
        for turn, book in enumerate(BOOKS.values()):
            weight = heavy_tailed(rows, columns).to(DTYPES[turn % 3])
            expected = reference.ovp_encode_reference(weight, scale, book.tensor(), group_size, pairing)
            found = emulated.encode(weight, scale, book.tensor(), group_size, pairing)
            assert torch.equal(found, expected), book.name


def test_encode_takes_16_bytes_at_a_time_where_it_can() -> None:
    emulated.steer()
    table, scale = BOOKS["int4"].tensor(), torch.full((1, 1), 0x3F80, dtype=torch.int16)
    for dtype, columns, name in (
        (torch.float32, 12, "ovp_encode"),
        (torch.float32, 14, "ovp_encode_unaligned"),
        (torch.bfloat16, 24, "ovp_encode"),
        (torch.float16, 12, "ovp_encode_unaligned"),
    ):
        weight = heavy_tailed(3, columns).to(dtype)
        emulated.launched()
        emulated.encode(weight, scale, table, 0, "optimal")
        assert emulated.launched() == [name]
        shifted = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view_as(weight).copy_(weight)
        expected = reference.ovp_encode_reference(weight, scale, table, 0, "optimal")
        assert torch.equal(emulated.encode(shifted, scale, table, 0, "optimal"), expected)
        assert emulated.launched() == ["ovp_encode_unaligned"]


def test_more_rows_than_the_grid_holds_encode_alike() -> None:
    emulated.steer(multiprocessors=1)
    weight, table = heavy_tailed(300, 40), BOOKS["adaptive"].tensor()
    scale = torch.randint(0x3B00, 0x3D00, (300, 2), dtype=torch.int16)
    expected = reference.ovp_encode_reference(weight, scale, table, 32, "optimal")
    assert torch.equal(emulated.encode(weight, scale, table, 32, "optimal"), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found(bad: float, group_size: int) -> None:
    emulated.steer()
    table = BOOKS["adaptive"].tensor()
    message = "weight: expected finite values, got NaN or Inf"
    for turn, at in enumerate(((0, 0), (2, 63), (4, 130))):
        weight = heavy_tailed(5, 131).to(DTYPES[turn])
        scale = torch.full(scale_shape(5, 131, group_size), 0x3F80, dtype=torch.int16)
        weight[at] = bad
        with pytest.raises(ValueError, match=message):
            emulated.quantize(weight, table, group_size, "optimal", *GRIDS, None)
        with pytest.raises(ValueError, match=message):
            emulated.encode(weight, scale, table, group_size, "optimal")


def test_another_group_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="group_size: expected -1, 0, 32, 64 or 128, got 16"):
        emulated_cuda().quantize(0, 0, 1, 1, 16, 0, False, *[0] * 10)
