"""Decode on the CPU kernels: the reference's bits, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from olive.formats import GROUP_SIZES
from olive.ops import cpu, reference
from tests.ops.cpu_cases import BOOKS, DTYPES, EACH_ISA, NEEDS_KERNELS, random_weight, strided
from tests.ops.fixed_point import assert_same_bits

pytestmark = NEEDS_KERNELS
SHAPES = ((1, 1), (1, 2), (3, 5), (17, 33), (5, 130), (2, 1030))


@EACH_ISA
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_decode_equals_the_reference(group_size: int, book: str, isa: str) -> None:
    for rows, columns in SHAPES:
        codes, scale, table = random_weight(rows, columns, group_size, book)
        for dtype in DTYPES:
            expected = reference.ovp_decode_reference(codes, scale, table, columns, group_size, dtype)
            found = cpu.ovp_decode_cpu(codes, scale, table, columns, group_size, dtype, isa)
            assert_same_bits(found, expected)


@EACH_ISA
@pytest.mark.parametrize("rule", [0, 1])
@pytest.mark.parametrize("book", BOOKS)
def test_every_byte_decodes_alike_invalid_ones_too(book: str, rule: int, isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scale = torch.tensor([[0x3F80], [-0x4080]], dtype=torch.int16) | rule  # 1 and -1
    table = BOOKS[book].tensor()
    for dtype in DTYPES:
        expected = reference.ovp_decode_reference(codes, scale, table, 512, -1, dtype)
        assert_same_bits(cpu.ovp_decode_cpu(codes, scale, table, 512, -1, dtype, isa), expected)


@EACH_ISA
def test_extreme_scales_round_and_overflow_as_the_reference_does(isa: str) -> None:
    """From the least subnormal scale to the largest finite one, and where float16 becomes subnormal."""
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
    table = BOOKS["adaptive"].tensor()
    for dtype in DTYPES:
        expected = reference.ovp_decode_reference(codes, scale, table, 96, -1, dtype)
        assert_same_bits(cpu.ovp_decode_cpu(codes, scale, table, 96, -1, dtype, isa), expected)


@EACH_ISA
def test_inputs_need_not_be_contiguous(isa: str) -> None:
    codes, scale, table = random_weight(7, 70, 32, "adaptive")
    expected = reference.ovp_decode_reference(codes, scale, table, 70, 32, torch.float32)
    views = (strided(codes), strided(scale), strided(table))
    assert not any(view.is_contiguous() for view in views)
    assert_same_bits(cpu.ovp_decode_cpu(*views, 70, 32, torch.float32, isa), expected)


def test_the_operator_runs_the_kernels() -> None:
    codes, scale, table = random_weight(7, 70, 32, "adaptive")
    expected = reference.ovp_decode_reference(codes, scale, table, 70, 32, torch.bfloat16)
    assert_same_bits(torch.ops.olive.ovp_decode(codes, scale, table, 70, 32, torch.bfloat16), expected)
