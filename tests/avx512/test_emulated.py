"""Operators on the kernels for AVX-512, VNNI and AMX, emulated: the bits of the oracle and of the reference.

tests/ops says more about the same kernels where the processor has the instructions; to run it on the emulated
ones: `python -m pytest -p tests.avx512.everywhere tests/ops`.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops import cpu, reference
from olive.ops.compensate import ovp_compensate_cpu, ovp_compensate_reference
from tests.avx512.module import EMULATED_ISAS, NEEDS_EMULATOR
from tests.ops.cpu_cases import BOOKS, DTYPES, heavy_tailed, random_weight
from tests.ops.fixed_point import assert_same_bits, ovp_linear_fixed_point
from tests.ops.test_compensate import assert_compensated_alike, compensation_case

pytestmark = NEEDS_EMULATOR
EACH_ISA = pytest.mark.parametrize("isa", EMULATED_ISAS)
ROWS = (1, 2, 5, 6, 7, 16, 17, 33, 100)
# (N, K): one; odd tails below a lane; a ragged second panel; several blocks, the last ragged.
SHAPES = ((1, 1), (3, 5), (33, 67), (50, 300))


def _activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator)
    x[:, columns // 2] *= 80.0
    x[-1, : columns // 2] = 0.0
    return x.to(dtype)


def test_the_module_has_every_instruction_set(emulated: ModuleType) -> None:
    assert cpu.cpu_isas() == ["portable", "avx2", *EMULATED_ISAS]


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_equals_the_fixed_point_oracle(
    rows: int, dtype: torch.dtype, isa: str, emulated: ModuleType
) -> None:
    for turn, shape in enumerate(SHAPES, start=rows):
        for group_size in GROUP_SIZES if shape[0] == 33 else (32, -1):
            book = list(BOOKS)[(turn + group_size) % len(BOOKS)]
            weight = random_weight(*shape, group_size, book)
            bias = None if turn % 3 == 0 else torch.linspace(-1, 2, shape[0]).to(DTYPES[turn % 3])
            x = _activations(rows, shape[1], dtype)
            x[rows // 2, shape[1] // 3] = float("nan") if turn % 2 else float("inf")
            expected = ovp_linear_fixed_point(x, *weight, bias, group_size)
            found = cpu.ovp_linear_cpu(x, *weight, bias, shape[0], group_size, isa)
            assert_same_bits(found, expected)
            assert bool(torch.isnan(found[rows // 2]).all())


@EACH_ISA
@pytest.mark.parametrize("book", BOOKS)
def test_linear_reads_every_codebook(book: str, isa: str, emulated: ModuleType) -> None:
    for dtype in DTYPES:
        for rows, group_size in ((3, 128), (18, 64)):
            weight = random_weight(21, 259, group_size, book)
            x = _activations(rows, 259, dtype)
            expected = ovp_linear_fixed_point(x, *weight, None, group_size)
            assert_same_bits(cpu.ovp_linear_cpu(x, *weight, None, 21, group_size, isa), expected)


@EACH_ISA
def test_threads_share_the_work(isa: str, emulated: ModuleType) -> None:
    """Each has tiles of its own; from 2^19 products on there is more than one."""
    weight = random_weight(70, 200, 64, "adaptive")
    x = _activations(100, 200, torch.bfloat16)
    expected = ovp_linear_fixed_point(x, *weight, None, 64)
    assert_same_bits(cpu.ovp_linear_cpu(x, *weight, None, 70, 64, isa), expected)


@EACH_ISA
@pytest.mark.parametrize("pairing", ["optimal", "paper"])
@pytest.mark.parametrize("book", BOOKS)
def test_quantize_encode_and_decode_equal_the_reference(
    book: str, pairing: str, isa: str, emulated: ModuleType
) -> None:
    table = BOOKS[book].tensor()
    pair_grid, plain_grid = [0.6, 0.8, 1.0], [0.7, 0.9] if BOOKS[book].has_plain else []
    for turn, ((rows, columns), group_size) in enumerate((((1, 1), -1), ((5, 77), 32), ((3, 300), 0))):
        dtype = DTYPES[turn % 3]
        weight = heavy_tailed(rows, columns).to(dtype)
        importance = torch.linspace(0.5, 2.0, columns) if turn == 1 else None
        search = (table, group_size, pairing, pair_grid, plain_grid, importance)
        codes, scale = cpu.ovp_quantize_cpu(weight, *search, isa)
        expected = reference.ovp_quantize_reference(weight, *search)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
        given = (scale, table, group_size, pairing)
        assert torch.equal(
            cpu.ovp_encode_cpu(weight, *given, isa), reference.ovp_encode_reference(weight, *given)
        )
        stored = (codes, scale, table, columns, group_size, dtype)
        assert_same_bits(cpu.ovp_decode_cpu(*stored, isa), reference.ovp_decode_reference(*stored))


@EACH_ISA
@pytest.mark.parametrize("codebook", ["int4", "adaptive"])
def test_compensation_follows_the_definition(codebook: str, isa: str, emulated: ModuleType) -> None:
    case = compensation_case(37, 64, codebook, "mixed", False)
    assert_compensated_alike(ovp_compensate_cpu(*case, isa=isa), ovp_compensate_reference(*case))
