"""Encode and scale search on the CPU kernels: the reference's bits, on every instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from olive.formats import CODEBOOKS, GROUP_SIZES, scale_shape
from olive.ops import cpu, reference
from tests.ops.cpu_cases import BOOKS, DTYPES, EACH_ISA, ISAS, NEEDS_KERNELS, heavy_tailed, strided

pytestmark = NEEDS_KERNELS
GRIDS = ([0.5, 0.75, 1.0], [0.6, 0.9])
# One value; a pair; an odd K below a lane's 8; ragged groups; a whole block; past a chunk of 1024 columns.
SHAPES = ((1, 1), (2, 2), (5, 7), (17, 130), (3, 256), (2, 1100))
PAIRINGS = ("optimal", "paper")


def _tail(rows: int, columns: int) -> Tensor:
    return heavy_tailed(rows, columns).clone()


def _ties(rows: int, columns: int) -> Tensor:
    """Multiples of a quarter up to 16: with scales of 1, 1/2 and so on every threshold is met exactly."""
    weight = torch.arange(rows * columns).reshape(rows, columns).remainder(129).sub(64) / 4.0
    weight[:, 0] = 16.0
    return weight


def _sparse(rows: int, columns: int) -> Tensor:
    weight = torch.zeros(rows, columns)
    weight[0, 0] = -0.0
    weight[-1, -1] = -3.0
    return weight


def _border(rows: int, columns: int) -> Tensor:
    """Groups on both sides of 2^-60, below which a group counts as zero."""
    weight = torch.full((rows, columns), 2.0**-61)
    weight[0, 0] = 2.0**-60
    weight[-1, -1] = -(2.0**-60) * (1 - 2.0**-20)
    return weight


def _outlier(rows: int, columns: int) -> Tensor:
    weight = heavy_tailed(rows, columns).clone()
    weight[:, columns // 2] = 80.0
    weight[:, columns // 3] = -80.0
    return weight


VALUES = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "sparse": _sparse,
    "ties": _ties,
    "border": _border,
    "outlier": _outlier,
    "tiny": lambda rows, columns: _tail(rows, columns) * 1e-30,
    "subnormal": lambda rows, columns: _tail(rows, columns) * 1e-38,
    "small": lambda rows, columns: _tail(rows, columns) * 1e-6,
    "large": lambda rows, columns: _tail(rows, columns).clamp(-1, 1) * 6e4,
    "huge": lambda rows, columns: _tail(rows, columns) * 1e17,
    "near the end of float32": lambda rows, columns: _tail(rows, columns) * 1e38,
}


@cache
def _expected(
    shape: tuple[int, int],
    values: str,
    dtype: torch.dtype,
    group_size: int,
    book: str,
    pairing: str,
    weighted: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Weight, importance, and the reference's codes and scale, computed once for all instruction sets."""
    make = VALUES.get(values, _tail)
    weight = make(*shape).to(dtype)
    importance = None
    if weighted:
        importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
        importance[::5] = 0.0
    codes, scale = reference.ovp_quantize_reference(
        weight, BOOKS[book].tensor(), group_size, pairing, *GRIDS, importance
    )
    return weight, importance, codes, scale


def _check(isa: str, key: tuple, group_size: int, book: str, pairing: str, weighted: bool) -> None:
    weight, importance, codes, scale = _expected(*key, group_size, book, pairing, weighted)
    before = weight.clone()
    table = BOOKS[book].tensor()
    found_codes, found_scale = cpu.ovp_quantize_cpu(
        weight, table, group_size, pairing, *GRIDS, importance, isa
    )
    assert torch.equal(found_scale, scale)
    assert torch.equal(found_codes, codes)
    assert torch.equal(weight, before)
    if not weighted:
        assert torch.equal(cpu.ovp_encode_cpu(weight, scale, table, group_size, pairing, isa), codes)


@EACH_ISA
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search_and_encode_equal_the_reference(
    shape: tuple[int, int], group_size: int, book: str, isa: str
) -> None:
    turn = SHAPES.index(shape) + GROUP_SIZES.index(group_size) + list(BOOKS).index(book)
    key = (shape, "tail", DTYPES[turn % 3])
    _check(isa, key, group_size, book, PAIRINGS[turn // 3 % 2], weighted=turn % 4 == 1)


@EACH_ISA
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_pairing_and_importance_equals_the_reference(
    dtype: torch.dtype, pairing: str, weighted: bool, isa: str
) -> None:
    for group_size in (-1, 0, 64):
        _check(isa, ((9, 141), "tail", dtype), group_size, "adaptive", pairing, weighted)


@EACH_ISA
@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("values", VALUES)
def test_unusual_values_equal_the_reference(values: str, group_size: int, isa: str) -> None:
    dtype = torch.float16 if values == "large" else torch.bfloat16 if values == "ties" else torch.float32
    for book in ("int4", "adaptive"):
        for pairing in PAIRINGS:
            _check(isa, ((4, 75), values, dtype), group_size, book, pairing, weighted=False)


@EACH_ISA
@pytest.mark.parametrize("grids", [([1.0], []), ([], [0.8]), ([2.5, 1.0, 0.1], [3.0, 0.2])], ids=str)
def test_every_kind_of_grid_equals_the_reference(grids: tuple[list[float], list[float]], isa: str) -> None:
    weight, table = heavy_tailed(5, 99), BOOKS["adaptive"].tensor()
    for group_size in (0, 32):
        expected = reference.ovp_quantize_reference(weight, table, group_size, "optimal", *grids, None)
        found = cpu.ovp_quantize_cpu(weight, table, group_size, "optimal", *grids, None, isa)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_encode_with_any_scale_equals_the_reference(pairing: str, group_size: int, isa: str) -> None:
    """Scales far off, negative ones, and the plain rule with codebooks that have it."""
    rows, columns = 6, 165
    weight = heavy_tailed(rows, columns)
    shape = scale_shape(rows, columns, group_size)
    values = 1e-3 * torch.exp2(30 * torch.rand(shape) - 15) * (torch.randint(2, shape) * 2 - 1)
    for name, book in BOOKS.items():
        scale = (values.view(torch.int32) >> 16).short() & ~1
        if book.has_plain:
            scale |= torch.randint(2, shape).short()
        expected = reference.ovp_encode_reference(weight, scale, book.tensor(), group_size, pairing)
        found = cpu.ovp_encode_cpu(weight, scale, book.tensor(), group_size, pairing, isa)
        assert torch.equal(found, expected), name


@EACH_ISA
def test_inputs_need_not_be_contiguous(isa: str) -> None:
    weight, importance = heavy_tailed(7, 45), torch.rand(45)
    table = BOOKS["adaptive"].tensor()
    for group_size in (0, 32):
        codes, scale = reference.ovp_quantize_reference(
            weight, table, group_size, "optimal", *GRIDS, importance
        )
        for view in (strided(weight), weight.t().contiguous().t()):
            assert not view.is_contiguous()
            found = cpu.ovp_quantize_cpu(
                view, strided(table), group_size, "optimal", *GRIDS, strided(importance), isa
            )
            assert torch.equal(found[0], codes)
            assert torch.equal(found[1], scale)
            plain = reference.ovp_encode_reference(weight, scale, table, group_size, "optimal")
            args = (strided(scale), strided(table), group_size, "optimal")
            assert torch.equal(cpu.ovp_encode_cpu(view, *args, isa), plain)


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_rejected(bad: float, group_size: int, isa: str) -> None:
    table = CODEBOOKS["adaptive"].tensor()
    for dtype in DTYPES:
        for at in ((0, 0), (2, 63), (4, 130)):
            weight = heavy_tailed(5, 131).to(dtype)
            scale = torch.full(scale_shape(5, 131, group_size), 0x3F80, dtype=torch.int16)
            weight[at] = bad
            with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
                cpu.ovp_quantize_cpu(weight, table, group_size, "optimal", *GRIDS, None, isa)
            with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
                cpu.ovp_encode_cpu(weight, scale, table, group_size, "optimal", isa)


def test_the_operator_runs_the_kernels() -> None:
    weight, table = heavy_tailed(5, 99), BOOKS["adaptive"].tensor()
    expected = reference.ovp_quantize_reference(weight, table, 32, "optimal", *GRIDS, None)
    found = torch.ops.olive.ovp_quantize(weight, table, 32, "optimal", *GRIDS, None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert cpu.cpu_backend() in ISAS


def test_an_unknown_instruction_set_is_rejected() -> None:
    table = CODEBOOKS["adaptive"].tensor()
    with pytest.raises(ValueError, match=r"isa: expected portable, avx2, .* got sse9"):
        cpu.ovp_quantize_cpu(torch.ones(2, 2), table, 32, "optimal", *GRIDS, None, "sse9")


def test_an_instruction_set_that_is_not_there_is_rejected() -> None:
    missing = [name for name in ("avx2", "avx512", "avx512_vnni", "amx") if name not in ISAS]
    if not missing:
        pytest.skip("this processor has every instruction set")
    table = CODEBOOKS["adaptive"].tensor()
    with pytest.raises(RuntimeError, match=f"isa: expected one that this processor .* got {missing[0]}"):
        cpu.ovp_quantize_cpu(torch.ones(2, 2), table, 32, "optimal", *GRIDS, None, missing[0])
