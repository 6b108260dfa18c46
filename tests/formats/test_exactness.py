"""What docs/format.md, section 10, says is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive.formats import CODEBOOKS, Codebook, ovp4_decode, ovp4_encode, pack_scale
from olive.formats.ovp4 import level_tables
from olive.formats.ovp8 import ovp8_decode_levels

BOOKS = list(CODEBOOKS.values())


def _levels(book: Codebook) -> Tensor:
    return level_tables(book).flatten().unique()


def _is_exact(levels: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(levels.double().to(dtype).double(), levels.double())


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_levels_are_int8_where_the_codebook_says_so(book: Codebook) -> None:
    assert _is_exact(_levels(book), torch.int8) == book.is_int8
    if book.is_int8:
        assert _levels(book).abs().max() <= 127


def test_a_product_of_133_000_int8_levels_fits_an_int32() -> None:
    assert 127 * 127 * 133_000 < 2**31


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["int4", "flint4"])
def test_levels_of_int4_and_flint4_are_exact_in_fp8(name: str, dtype: torch.dtype) -> None:
    assert _is_exact(_levels(CODEBOOKS[name]), dtype)


@pytest.mark.parametrize("name", ["int4", "flint4"])
def test_levels_of_int4_and_flint4_are_the_upper_byte_of_a_float16(name: str) -> None:
    assert not bool((_levels(CODEBOOKS[name]).half().view(torch.int16) & 0xFF).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_all_levels_are_exact_in_fp16_and_bf16(book: Codebook, dtype: torch.dtype) -> None:
    assert _is_exact(_levels(book), dtype)


def test_eight_bit_levels_are_exact_in_bf16_and_not_in_int8() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    levels = ovp8_decode_levels(torch.cartesian_prod(byte, byte).reshape(1, -1)).unique()
    assert levels.min() == -(2**15)
    assert levels.max() == 2**15
    assert _is_exact(levels, torch.bfloat16)
    assert not _is_exact(levels, torch.int8)


def test_product_of_two_eight_bit_outliers_fits_an_int32() -> None:
    assert (2**15) ** 2 < 2**31


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_decoded_weights_are_exact_in_float32(book: Codebook) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 96, generator=generator)
    plain = torch.rand(8, 3, generator=generator) < (0.5 if book.has_plain else 0.0)
    scale = pack_scale(torch.rand(8, 3, generator=generator) * 0.1 + 0.01, plain)
    codes = ovp4_encode(weight, scale, book, 32)
    levels = ovp4_decode(codes, pack_scale(torch.ones(8, 3), plain), book, 96, 32)
    value = (scale.int() & 0xFFFE).bitwise_left_shift(16).view(torch.float32).repeat_interleave(32, 1)
    assert torch.equal(ovp4_decode(codes, scale, book, 96, 32).double(), levels.double() * value.double())
