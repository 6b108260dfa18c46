"""Decode on the CUDA kernels: the reference's bits, from both layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops import reference
from tests.cuda import emulated
from tests.cuda.module import NEEDS_COMPILER, SCHEDULES
from tests.ops.cpu_cases import BOOKS, DTYPES, random_weight
from tests.ops.fixed_point import assert_same_bits

pytestmark = NEEDS_COMPILER
# One value; an odd K; ragged groups; 16 bytes at a time; blocks side by side, the last one ragged or not.
SHAPES = ((1, 1), (3, 5), (17, 36), (5, 130), (20, 136), (2, 520), (2, 1030))


def _check(codes: Tensor, scale: Tensor, table: Tensor, columns: int, group_size: int) -> None:
    """From both layouts, to every type."""
    rows = codes.shape[0]
    packed = emulated.pack(codes, scale, columns, group_size)
    emulated.launched()
    for dtype in DTYPES:
        expected = reference.ovp_decode_reference(codes, scale, table, columns, group_size, dtype)
        at_once = 16 // dtype.itemsize
        for layout, stored in (("", (codes, scale)), ("_packed", packed)):
            found = emulated.decode(*stored, table, rows, columns, group_size, dtype)
            assert_same_bits(found, expected)
            unaligned = "_unaligned" if columns % at_once else ""
            assert emulated.launched() == [f"ovp_decode{layout}{unaligned}"]


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_decode_equals_the_reference(group_size: int, book: str) -> None:
    emulated.steer(schedule=7)
    for rows, columns in SHAPES[list(BOOKS).index(book) % 2 :: 2]:
        _check(*random_weight(rows, columns, group_size, book), columns, group_size)


def test_more_rows_than_the_grid_holds_decode_alike() -> None:
    emulated.steer(multiprocessors=1)
    _check(*random_weight(300, 40, 32, "adaptive"), 40, 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", [0, 1])
def test_every_byte_decodes_alike_invalid_ones_too(rule: int, schedule: int) -> None:
    emulated.steer(schedule)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scale = torch.tensor([[0x3F80], [-0x4080]], dtype=torch.int16) | rule  # 1 and -1
    for book in BOOKS.values():
        _check(codes, scale, book.tensor(), 512, -1)


def test_extreme_scales_round_and_overflow_as_the_reference_does() -> None:
    """From the least subnormal scale to the largest finite one, and where float16 becomes subnormal."""
    emulated.steer()
    patterns = [
        0x0002,
        0x0004,
        0x0100,
        0x0080,
        0x3300,
        0x3380,
        0x3870,
        0x3882,
        0x4400,
        0x4478,
        0x7F00,
        0x7F7E,
    ]
    scale = torch.tensor(patterns, dtype=torch.int16)[:, None]
    scale = torch.cat((scale, scale | 1, scale | -0x8000, scale | -0x7FFF))
    codes = random_weight(len(scale), 96, -1, "adaptive")[0]
    _check(codes, scale, BOOKS["adaptive"].tensor(), 96, -1)


def test_codes_at_an_odd_address_are_read_byte_by_byte() -> None:
    emulated.steer()
    codes, scale, table = random_weight(3, 64, 32, "adaptive")
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view_as(codes).copy_(codes)
    expected = reference.ovp_decode_reference(codes, scale, table, 64, 32, torch.bfloat16)
    emulated.launched()
    assert_same_bits(emulated.decode(shifted, scale, table, 3, 64, 32, torch.bfloat16), expected)
    assert emulated.launched() == ["ovp_decode_unaligned"]
