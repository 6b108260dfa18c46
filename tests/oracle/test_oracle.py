"""The package's reference and the NumPy implementation of docs/format.md agree value by value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy_ovp as oracle
import pytest
import torch
from torch import Tensor

from olive import ops
from olive.formats import (
    CODEBOOKS,
    GROUP_SIZES,
    PAIRINGS,
    Codebook,
    ovp4_decode,
    ovp4_encode,
    ovp8_decode,
    ovp8_encode,
    pack_scale,
    scale_shape,
)
from olive.ops.reference import ordered_sum, ovp_quantize_reference
from olive.ptq.grids import PAIR_GRID, PAPER_GRID, PLAIN_GRID

UNUSUAL = Codebook(  # tables as a fit could give them: uneven, P not symmetric, its end not 127
    "unusual",
    (0, 3, 7, 9, 20, 21, 30, 33),
    (0, 34, 60, 61, 80, 90, 100, 126),
    (-90, -70, -61, -44, -30, -20, -9, -2, 0, 3, 11, 20, 33, 47, 60, 101),
)
BOOKS = [*CODEBOOKS.values(), UNUSUAL]
SHORT_PAIR, SHORT_PLAIN = list(PAIR_GRID[::10]), list(PLAIN_GRID[::10])


def _student(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, rows, columns, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _sparse(rows: int, columns: int, seed: int) -> Tensor:
    """Whole groups of zeros, minus zeros, and lone values."""
    weight = _student(rows, columns, seed)
    weight[:, : columns // 2] = 0.0
    weight[0] = -0.0
    weight[-1, 1:] = 0.0
    return weight


def _halves(rows: int, columns: int, seed: int) -> Tensor:
    """Multiples of one half: many values lie on thresholds and many pairs tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-260, 261, (rows, columns), generator=generator) * 0.5


INPUTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "student": _student,
    "uniform": lambda n, k, seed: torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) - 0.3,
    "zeros_inside": _sparse,
    "halves": _halves,
    "tiny": lambda n, k, seed: _student(n, k, seed) * 2.0**-59,  # some groups below 2^-60, some above
    "huge": lambda n, k, seed: _student(n, k, seed) * 2.0**100,  # squares overflow float32
    "outlier": lambda n, k, seed: _student(n, k, seed).index_fill(1, torch.tensor([k // 2]), 300.0),
    "all_equal": lambda n, k, seed: torch.full((n, k), -0.37),
}
SHAPES = [(3, 64), (2, 200), (3, 77), (1, 1), (2, 3)]


def _stored(book: Codebook) -> bytes:
    return bytes(book.tensor().view(torch.uint8).tolist())


def _same(ours: Tensor, theirs: oracle.Array) -> None:
    assert ours.dtype == torch.from_numpy(theirs).dtype
    assert tuple(ours.shape) == theirs.shape
    assert torch.equal(ours, torch.from_numpy(theirs))


def _scales(weight: Tensor, book: Codebook | None, group_size: int, seed: int) -> Tensor:
    """Scales of about a third of the largest value, some plain, some negative where that is allowed."""
    generator = torch.Generator().manual_seed(seed)
    shape = scale_shape(*weight.shape, group_size)
    unit = weight.abs().max().clamp(min=2.0**-60) / (90.0 if book is None else 3.0 * book.normal[7])
    scale = unit * (0.2 + torch.rand(shape, generator=generator))
    plain = torch.rand(shape, generator=generator) < 0.5
    if book is None or not book.has_plain:
        return pack_scale(scale, torch.zeros_like(plain))
    sign = torch.where(plain & (torch.rand(shape, generator=generator) < 0.5), -1.0, 1.0)
    return pack_scale(scale * sign, plain)


def _compare_search(
    weight: Tensor,
    book: Codebook,
    group_size: int,
    pairing: str,
    grids: tuple[list[float], list[float]],
    importance: Tensor | None = None,
) -> None:
    arguments = (weight, book.tensor(), group_size, pairing, *grids, importance)
    codes, scale = ovp_quantize_reference(*arguments)
    dispatched_codes, dispatched_scale = ops.ovp_quantize(*arguments)  # the kernels, where they were built
    assert torch.equal(dispatched_scale, scale)
    assert torch.equal(dispatched_codes, codes)
    with np.errstate(all="ignore"):
        their_codes, their_scale = oracle.quantize(
            weight.numpy(),
            _stored(book),
            group_size,
            pairing,
            *grids,
            None if importance is None else importance.numpy(),
        )
    _same(scale, their_scale)
    _same(codes, their_codes)
    decoded = ovp4_decode(codes, scale, book, weight.shape[1], group_size)
    _same(decoded, oracle.decode(codes.numpy(), scale.numpy(), _stored(book), weight.shape[1], group_size))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_encode_and_decode_agree(book: Codebook, group_size: int, pairing: str) -> None:
    for seed, (kind, make) in enumerate(INPUTS.items()):
        for rows, columns in SHAPES:
            weight = make(rows, columns, seed)
            scale = _scales(weight, book, group_size, seed)
            codes = ovp4_encode(weight, scale, book, group_size, pairing)
            theirs = oracle.encode(weight.numpy(), scale.numpy(), _stored(book), group_size, pairing)
            assert np.array_equal(codes.numpy(), theirs), f"{kind} {rows}x{columns}"
            _same(
                ovp4_decode(codes, scale, book, columns, group_size),
                oracle.decode(theirs, scale.numpy(), _stored(book), columns, group_size),
            )


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_encode_with_importance_agrees(book: Codebook, group_size: int) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        weight = _student(rows, columns, seed)
        importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 4
        importance[::5] = 0.0
        scale = _scales(weight, book, group_size, seed)
        codes = ovp4_encode(weight, scale, book, group_size, importance=importance)
        _same(
            codes,
            oracle.encode(
                weight.numpy(), scale.numpy(), _stored(book), group_size, importance=importance.numpy()
            ),
        )


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_search_agrees(book: Codebook, group_size: int, kind: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        weight = INPUTS[kind](rows, columns, seed)
        _compare_search(weight, book, group_size, "optimal", (SHORT_PAIR, SHORT_PLAIN))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_search_with_importance_agrees(book: Codebook, group_size: int) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        weight = _student(rows, columns, seed)
        importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 4
        importance[::7] = 0.0
        _compare_search(weight, book, group_size, "optimal", (SHORT_PAIR, SHORT_PLAIN), importance)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_search_over_the_full_grids_agrees(book: Codebook, group_size: int) -> None:
    _compare_search(_student(2, 150, 7), book, group_size, "optimal", (list(PAIR_GRID), list(PLAIN_GRID)))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("name", ["int4", "flint4"])
def test_paper_search_agrees(name: str, group_size: int) -> None:
    for kind in ("student", "outlier", "zeros_inside"):
        _compare_search(INPUTS[kind](2, 150, 3), CODEBOOKS[name], group_size, "paper", (list(PAPER_GRID), []))


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 2100])
def test_search_agrees_past_one_chunk_of_the_ordered_sum(columns: int) -> None:
    book = CODEBOOKS["adaptive"]
    for group_size in (-1, 0):
        _compare_search(_student(2, columns, 5), book, group_size, "optimal", ([0.6, 0.8, 1.0], [0.8, 0.9]))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_eight_bits_agree(group_size: int, pairing: str) -> None:
    for seed, (kind, make) in enumerate(INPUTS.items()):
        for rows, columns in SHAPES:
            weight = make(rows, columns, seed)
            scale = _scales(weight, None, group_size, seed)
            if kind == "halves":  # keep the ties
                scale = torch.full_like(scale, 0x3F80)
            codes = ovp8_encode(weight, scale, group_size, pairing)
            theirs = oracle.encode8(weight.numpy(), scale.numpy(), group_size, pairing)
            assert np.array_equal(codes.numpy(), theirs), f"{kind} {rows}x{columns}"
            _same(
                ovp8_decode(codes, scale, columns, group_size),
                oracle.decode8(theirs, scale.numpy(), columns, group_size),
            )


def test_every_byte_decodes_alike() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    for book in BOOKS:
        scale = torch.tensor([[0x3F80], [0xBF01 - 0x10000 if book.has_plain else 0x3F80]], dtype=torch.int16)
        _same(
            ovp4_decode(codes, scale, book, 512, -1),
            oracle.decode(codes.numpy(), scale.numpy(), _stored(book), 512, -1),
        )


def test_every_pair_of_bytes_decodes_alike_in_eight_bits() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    codes = torch.cartesian_prod(byte, byte).reshape(256, 512)
    scale = torch.full((1, 1), 0x3F80, dtype=torch.int16)
    _same(ovp8_decode(codes, scale, 512, 0), oracle.decode8(codes.numpy(), scale.numpy(), 512, 0))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 500, 512, 513, 1100])
def test_ordered_sums_agree(count: int) -> None:
    """Bit for bit: another order would rarely show in the scales it decides between."""
    values = _student(4, count, count).square()
    assert ordered_sum(values).tolist() == [float(oracle.ordered_sum(row)) for row in values.numpy()]
