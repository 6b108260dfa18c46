"""`ovp_encode_triton` writes the reference's bytes."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, PAIRINGS, scale_shape
from olive.formats.scales import pack_scale
from olive.ops.reference import ovp_encode_reference
from tests.kernels.conftest import in_turn
from tests.ops.cpu_cases import BOOKS, heavy_tailed, random_weight, strided

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (2, 2), (5, 7), (5, 331))


def _check(
    kernels: ModuleType, device: str, weight: Tensor, scale: Tensor, book: str, group_size: int, pairing: str
) -> None:
    table = BOOKS[book].tensor()
    expected = ovp_encode_reference(weight, scale, table, group_size, pairing)
    arguments = [tensor.to(device) for tensor in (weight, scale, table)]
    assert torch.equal(kernels.ovp_encode_triton(*arguments, group_size, pairing).cpu(), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS)
def test_bytes_equal_the_reference(kernels: ModuleType, device: str, book: str, group_size: int) -> None:
    """Scales of both signs, far off for some values, and both rules where the codebook has them."""
    turn = list(BOOKS).index(book) + GROUP_SIZES.index(group_size)
    for rows, columns in in_turn(SHAPES, turn):
        weight = heavy_tailed(rows, columns).to(FLOATS[(turn + columns) % 3])
        _, scale, _ = random_weight(rows, columns, group_size, book)
        for pairing in in_turn(PAIRINGS, turn):
            _check(kernels, device, weight, scale, book, group_size, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("book", BOOKS)
def test_ties_are_broken_alike(kernels: ModuleType, device: str, book: str, pairing: str) -> None:
    """Values on the thresholds of all tables, beside one another, themselves and their negatives."""
    tables = BOOKS[book]
    thresholds = {0.0, (tables.normal[7] + tables.outlier[1]) / 2}
    for levels in (tables.normal, tables.outlier[1:], tables.plain):
        thresholds |= {(low + high) / 2 for low, high in pairwise(levels)}
    value = torch.tensor(sorted(thresholds | {-threshold for threshold in thresholds}))
    partners = [value, -value, *(value.roll(shift) for shift in range(1, 8))]
    weight = torch.stack([torch.stack((value, partner), 1) for partner in partners]).reshape(1, -1)
    weight = weight.repeat(2, 1)
    plain = torch.tensor([[False], [tables.has_plain]])
    _check(kernels, device, weight, pack_scale(torch.ones(2, 1), plain), book, -1, pairing)


@pytest.mark.parametrize("book", ["int4", "adaptive"])
@pytest.mark.parametrize("exponent", [-133, -128, -127, -100, 100, 127])
def test_scales_at_the_ends_of_float32_encode_alike(
    kernels: ModuleType, device: str, exponent: int, book: str
) -> None:
    """1 / scale overflows below 2^-128, and 0 times it is NaN."""
    weight = heavy_tailed(4, 64).clone()
    weight[1] *= 2.0**exponent
    weight[2] = 0.0
    value = torch.tensor(2.0, dtype=torch.float64).pow(exponent).float().expand(4, 1)
    plain = torch.tensor([[False], [False], [BOOKS[book].has_plain], [BOOKS[book].has_plain]])
    for pairing in in_turn(PAIRINGS, exponent):
        _check(kernels, device, weight, pack_scale(value, plain), book, -1, pairing)


def test_inputs_need_not_be_contiguous(kernels: ModuleType, device: str) -> None:
    weight = heavy_tailed(5, 45)
    codes, scale, table = random_weight(5, 45, 32, "adaptive")
    codes = ovp_encode_reference(weight, scale, table, 32, "optimal")
    for view in (strided(weight), weight.t().contiguous().t()):
        arguments = [tensor.to(device) for tensor in (view, strided(scale), strided(table))]
        assert torch.equal(kernels.ovp_encode_triton(*arguments, 32, "optimal").cpu(), codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("value_dtype", FLOATS, ids=str)
def test_a_value_that_is_not_finite_is_rejected(
    kernels: ModuleType, device: str, value_dtype: torch.dtype, bad: float
) -> None:
    table = BOOKS["adaptive"].tensor().to(device)
    scale = torch.full(scale_shape(5, 331, 128), 0x3F80, dtype=torch.int16, device=device)
    for at in in_turn([(0, 0), (4, 63), (2, 330)], FLOATS.index(value_dtype)):
        weight = heavy_tailed(5, 331).to(value_dtype)
        weight[at] = bad
        with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
            kernels.ovp_encode_triton(weight.to(device), scale, table, 128, "optimal")
