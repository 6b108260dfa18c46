"""Four-bit pairs, exhaustively: every byte, every kind of tie, every error of the validator."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from olive.formats import (
    CODEBOOKS,
    GROUP_SIZES,
    PAIRINGS,
    Codebook,
    Pairing,
    get_codebook,
    outlier_pairs,
    ovp4_decode,
    ovp4_encode,
    ovp4_validate,
    pack_scale,
    scale_shape,
)
from olive.formats.ovp4 import INVALID_PAIRS, ovp4_decode_levels

BOOKS = list(CODEBOOKS.values())
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)[None]
VALID = torch.tensor([[byte for byte in range(256) if byte not in INVALID_PAIRS]], dtype=torch.uint8)
by_name = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)


def _scale(value: float, plain: bool = False, shape: tuple[int, int] = (1, 1)) -> Tensor:
    return pack_scale(torch.full(shape, value), torch.full(shape, plain))


def _levels(book: Codebook, byte: int) -> tuple[int, int]:
    """The format's table in prose: what the two nibbles of a byte mean under the pair rule."""
    low, high = byte & 15, byte >> 4

    def level(this: int, partner: int) -> int:
        if this == 8:
            return 0
        magnitude = (book.outlier if partner == 8 else book.normal)[this % 8]
        return -magnitude if this > 8 else magnitude

    return level(low, high), level(high, low)


@by_name
def test_every_byte_decodes_as_defined(book: Codebook) -> None:
    decoded = ovp4_decode(EVERY_BYTE, _scale(1.0), book, 512, -1).view(256, 2)
    assert decoded.tolist() == [list(_levels(book, byte)) for byte in range(256)]


@by_name
def test_valid_bytes_have_253_different_meanings(book: Codebook) -> None:
    assert VALID.numel() == 253
    decoded = ovp4_decode(VALID, _scale(1.0), book, 506, -1).view(253, 2)
    assert len({tuple(pair) for pair in decoded.tolist()}) == 253


@by_name
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_valid_byte_round_trips(book: Codebook, pairing: Pairing) -> None:
    weight = ovp4_decode(VALID, _scale(1.0), book, 506, -1)
    assert torch.equal(ovp4_encode(weight, _scale(1.0), book, -1, pairing), VALID)


def test_every_byte_round_trips_in_a_plain_group() -> None:
    book = get_codebook("adaptive")
    for value in (1.0, -1.0):
        weight = ovp4_decode(EVERY_BYTE, _scale(value, plain=True), book, 512, -1)
        expected = [value * book.plain[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
        assert weight[0].tolist() == expected
        assert torch.equal(ovp4_encode(weight, _scale(value, plain=True), book, -1), EVERY_BYTE)


@by_name
@pytest.mark.parametrize("byte", INVALID_PAIRS)
def test_invalid_bytes_decode_to_zeros_and_are_rejected(book: Codebook, byte: int) -> None:
    codes = torch.tensor([[0x21, byte], [0x00, 0x11]], dtype=torch.uint8)
    scale = _scale(0.5, shape=(2, 1))
    assert ovp4_decode(codes, scale, book, 4, -1)[0, 2:].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=rf"fc\.codes: expected valid .* got byte 0x{byte:02x} at \[0, 1\]"):
        ovp4_validate(codes, scale, book.tensor(), out_features=2, in_features=4, group_size=-1, name="fc")


def test_invalid_bytes_are_valid_in_plain_groups_only() -> None:
    book = get_codebook("adaptive").tensor()
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 16] = 0x88
    scale = torch.cat((_scale(1.0), _scale(-1.0, plain=True)), dim=1)
    size = {"out_features": 1, "in_features": 64, "group_size": 32}
    assert ovp4_validate(codes, scale, book, **size) == Codebook.from_tensor(book, "weight.codebook")
    codes[0, 15] = 0x08
    with pytest.raises(
        ValueError,
        match=re.escape("weight.codes: expected valid outlier-victim pairs, got byte 0x08 at [0, 15]"),
    ):
        ovp4_validate(codes, scale, book, **size)


def _thresholds(book: Codebook) -> Tensor:
    """Levels, all midpoints that an encoder compares with, quarters around them, values past both ends."""
    magnitudes = sorted({*book.normal, *book.outlier})
    plain = sorted(abs(level) for level in book.plain)
    middles = [(a + b) / 2 for levels in (magnitudes, plain) for a, b in pairwise(levels)]
    points = {
        0.0,
        0.25,
        300.0,
        *magnitudes,
        *middles,
        *(m + 0.25 for m in middles),
        *(m - 0.25 for m in middles),
    }
    return torch.tensor(sorted({*points, *(-point for point in points)}))


def _brute_force(t: Tensor, book: Codebook) -> Tensor:
    """Least squared error of each pair t [P, 2] over all 253 bytes: float64 [P]."""
    pairs = torch.tensor([_levels(book, int(byte)) for byte in VALID[0]], dtype=torch.float64)
    return torch.stack([((t.double() - pair) ** 2).sum(-1) for pair in pairs]).amin(0)


def _encoded_error(t: Tensor, book: Codebook) -> Tensor:
    columns = t.numel()
    codes = ovp4_encode(t.reshape(1, -1), _scale(1.0), book, -1)
    decoded = ovp4_decode(codes, _scale(1.0), book, columns, -1)
    return ((t.double() - decoded.view(-1, 2).double()) ** 2).sum(-1)


@by_name
def test_pair_choice_is_optimal_on_boundaries(book: Codebook) -> None:
    """Values are multiples of 1/4 up to 300: every error is exact in float32, so ties are ties."""
    values = _thresholds(book)
    t = torch.cartesian_prod(values, values)
    assert torch.equal(_encoded_error(t, book), _brute_force(t, book))


@by_name
def test_pair_choice_is_optimal_on_random_pairs(book: Codebook) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(20_000, 1, generator=generator) * 2 * book.outlier[7]
    t = torch.randn(20_000, 2, generator=generator) * spread / 2
    least, ours = _brute_force(t, book), _encoded_error(t, book)
    # float32 rounds the three errors, each of at most four operations, by 2^-24 of the values' squares at
    # most
    tolerance = 8 * 2.0**-24 * (t.double() ** 2).sum(-1)
    assert bool((ours <= least + tolerance).all())


def test_importance_moves_the_choice() -> None:
    book = get_codebook("int4")
    weight = torch.tensor([[9.0, 1.4]])  # normal pair: 2^2 + 0.4^2; outlier 12 and victim: 3^2 + 1.4^2

    def encode(importance: Tensor | None) -> list[list[float]]:
        codes = ovp4_encode(weight, _scale(1.0), book, -1, importance=importance)
        return ovp4_decode(codes, _scale(1.0), book, 2, -1).tolist()

    assert encode(None) == [[7.0, 1.0]]
    assert encode(torch.tensor([1.0, 1.0])) == [[7.0, 1.0]]
    weight[0] = torch.tensor([10.0, 2.4])  # normal: 3^2 + 0.4^2; outlier 12, victim: 2^2 + 2.4^2
    assert encode(None) == [[7.0, 2.0]]
    assert encode(torch.tensor([4.0, 1.0])) == [[12.0, 0.0]]
    assert encode(torch.tensor([0.0, 1.0])) == [[7.0, 2.0]]


@pytest.mark.parametrize(
    ("pair", "byte"),
    [
        ((0.5, 1.5), 0x10),  # on a threshold: the lower level
        ((-0.5, -1.5), 0x90),  # the lower magnitude
        ((-0.3, -0.0), 0x00),  # no minus zero: it would be the identifier
        ((9.5, 0.0), 0x07),  # 7 and 12 are equally far: normal goes first
        ((0.0, -9.5), 0xF0),
        ((24.0, 24.0), 0x83),  # (outlier, victim) goes before (victim, outlier)
        ((24.0, -32.0), 0xC8),
        ((14.0, 0.0), 0x81),  # between the outliers 12 and 16: the lower one
        ((1e6, 1.0), 0x87),
        ((-1e6, 1.0), 0x8F),
    ],
)
def test_ties_go_to_the_earlier_and_lower(pair: tuple[float, float], byte: int) -> None:
    assert int(ovp4_encode(torch.tensor([pair]), _scale(1.0), get_codebook("int4"), -1)) == byte


def test_plain_ties_go_to_the_lower_level() -> None:
    book = get_codebook("adaptive")
    weight = torch.tensor([[5.0, -6.0], [109.5, -107.5], [1e30, -1e30]])
    expected = [[0.0, -12.0], [92.0, -127.0], [127.0, -127.0]]
    scale = _scale(1.0, plain=True, shape=(3, 1))
    assert ovp4_decode(ovp4_encode(weight, scale, book, -1), scale, book, 2, -1).tolist() == expected


@pytest.mark.parametrize(
    ("pair", "byte"),
    [
        ((9.5, 1.0), 0x17),  # on the threshold between 7 and 12: normal
        ((9.6, 6.0), 0x81),  # past it: an outlier, whatever it costs the neighbour
        ((6.0, -9.6), 0x98),
        ((10.0, 30.0), 0x48),  # both past: the larger stays, not the left one as in the released code
        ((-30.0, 10.0), 0x8C),  # by magnitude, not by signed value as printed in Algorithm 1
        ((20.0, -20.0), 0x82),  # equal: the even one; 20 is between 16 and 24
    ],
)
def test_paper_pairing(pair: tuple[float, float], byte: int) -> None:
    assert int(ovp4_encode(torch.tensor([pair]), _scale(1.0), get_codebook("int4"), -1, "paper")) == byte


@pytest.mark.parametrize("columns", [1, 3, 33, 77])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_odd_k_gets_one_pad_column(columns: int, group_size: int) -> None:
    book = get_codebook("adaptive")
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(3, columns, generator=generator)
    shape = scale_shape(3, columns, group_size)
    scale = pack_scale(torch.full(shape, 0.02), torch.arange(shape[1]).expand(shape) % 2 == 1)
    codes = ovp4_encode(weight, scale, book, group_size)
    assert codes.shape == (3, (columns + 1) // 2)
    decoded = ovp4_decode(codes, scale, book, columns, group_size)
    even = ovp4_decode(codes, scale, book, columns + 1, group_size)
    assert decoded.shape == (3, columns)
    assert torch.equal(decoded, even[:, :columns])
    assert torch.equal(even[:, columns], torch.zeros(3))


def test_encode_takes_every_float_type_and_stride() -> None:
    book, scale = get_codebook("nf4"), _scale(0.02, shape=(4, 1))
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).bfloat16().t()
    expected = ovp4_encode(weight.float().contiguous(), scale, book, -1)
    assert torch.equal(ovp4_encode(weight, scale, book, -1), expected)
    half = weight.half()
    assert torch.equal(ovp4_encode(half, scale, book, -1), ovp4_encode(half.float(), scale, book, -1))


def test_decode_levels_broadcasts_over_leading_dimensions() -> None:
    book = get_codebook("adaptive")
    levels = ovp4_decode_levels(EVERY_BYTE.view(2, 2, 64), torch.tensor([[[False]], [[True]]]), book)
    assert levels.dtype == torch.int16
    assert levels.shape == (2, 2, 128)
    assert levels[0].flatten()[:4].tolist() == [0, 0, 4, 0]
    assert levels[1].flatten()[:4].tolist() == [-127, 10, -88, 10]  # bytes 80 and 81


def test_outlier_pairs_are_found() -> None:
    codes = torch.tensor([[0x21, 0x83, 0x38, 0x99], [0x21, 0x83, 0x38, 0x99]], dtype=torch.uint8)
    found = outlier_pairs(codes, torch.tensor([[False], [True]]))
    assert found.tolist() == [[False, True, True, False], [False] * 4]


# The validator


def _stored(book: str = "adaptive") -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and codebook of a valid weight [3, 70] in groups of 32."""
    return torch.zeros(3, 35, dtype=torch.uint8), _scale(0.5, shape=(3, 3)), get_codebook(book).tensor()


def _validate(codes: Tensor, scale: Tensor, codebook: Tensor) -> Codebook:
    return ovp4_validate(codes, scale, codebook, out_features=3, in_features=70, group_size=32, name="fc")


def test_validate_returns_the_codebook() -> None:
    assert _validate(*_stored()).plain == get_codebook("adaptive").plain


def test_validate_rejects_other_types() -> None:
    codes, scale, book = _stored()
    with pytest.raises(TypeError, match=re.escape("fc.codes: expected torch.uint8, got torch.int8")):
        _validate(codes.to(torch.int8), scale, book)
    with pytest.raises(TypeError, match=re.escape("fc.scale: expected torch.int16, got torch.bfloat16")):
        _validate(codes, scale.view(torch.bfloat16), book)
    with pytest.raises(TypeError, match=re.escape("fc.codebook: expected int8, got torch.uint8")):
        _validate(codes, scale, book.view(torch.uint8))


def test_validate_rejects_other_shapes() -> None:
    codes, scale, book = _stored()
    with pytest.raises(ValueError, match=re.escape("fc.codes: expected shape (3, 35), got (3, 34)")):
        _validate(codes[:, :34], scale, book)
    with pytest.raises(ValueError, match=re.escape("fc.codes: expected shape (3, 35), got (105,)")):
        _validate(codes.flatten(), scale, book)
    with pytest.raises(ValueError, match=re.escape("fc.scale: expected shape (3, 3), got (3, 1)")):
        _validate(codes, scale[:, :1], book)
    with pytest.raises(ValueError, match=re.escape("fc.codebook: expected shape (32,), got (16,)")):
        _validate(codes, scale, book[:16])


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        (0x0000, "0.0"),
        (0x0001, "0.0"),  # zero with a rule bit
        (0x7F80, "inf"),
        (0x7F81, "inf"),  # unread lowest bit: still infinity
        (0x7FC0, "nan"),
        (0xBF80 - 0x10000, "-1.0"),  # negative under the pair rule
    ],
)
def test_validate_rejects_bad_scales(pattern: int, shown: str) -> None:
    codes, scale, book = _stored()
    scale[1, 2] = pattern
    with pytest.raises(ValueError, match=rf"fc\.scale: expected finite non-zero .*, got {shown} at \[1, 2\]"):
        _validate(codes, scale, book)


def test_validate_rejects_a_rule_bit_without_plain_levels() -> None:
    codes, scale, book = _stored("nf4")
    scale[2, 0] |= 1
    with pytest.raises(ValueError, match=r"fc\.scale: expected no rule bit, .* got one at \[2, 0\]"):
        _validate(codes, scale, book)


def test_validate_rejects_a_bad_codebook() -> None:
    codes, scale, book = _stored()
    book[3] = 0
    with pytest.raises(ValueError, match=r"codebook 'fc\.codebook', normal: expected 8 rising"):
        _validate(codes, scale, book)
