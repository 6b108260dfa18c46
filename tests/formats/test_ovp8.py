"""Eight-bit pairs, exhaustively: every pair of bytes, optimality, every error of the validator."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from olive.formats import PAIRINGS, Pairing, ovp8_decode, ovp8_encode, ovp8_validate, pack_scale
from olive.formats.ovp8 import abfloat_magnitude, ovp8_decode_levels

ONE = torch.full((1, 1), 0x3F80, dtype=torch.int16)
BYTE = torch.arange(256, dtype=torch.uint8)


def _pairs() -> tuple[Tensor, Tensor]:
    """All 65536 pairs of bytes [65536, 2], and which are valid by the format's definition."""
    pairs = torch.cartesian_prod(BYTE, BYTE)
    first, second = pairs.unbind(-1)

    def outlier(byte: Tensor) -> Tensor:
        return ((byte & 0x7F) >= 1) & ((byte & 0x7F) <= 0x40)

    both_normal = (first != 0x80) & (second != 0x80)
    valid = both_normal | ((first == 0x80) & outlier(second)) | ((second == 0x80) & outlier(first))
    return pairs, valid


def _rows(pairs: Tensor) -> Tensor:
    return pairs.reshape(1, -1)


def test_abfloat_magnitudes() -> None:
    magnitude = abfloat_magnitude(torch.arange(128))
    assert magnitude[[0, 1, 7, 8, 9, 0x3F, 0x40]].tolist() == [0, 144, 240, 256, 288, 30720, 32768]
    assert bool((magnitude[1:] > magnitude[:-1]).all())


def test_every_pair_of_bytes_decodes_as_defined() -> None:
    pairs, _ = _pairs()
    levels = ovp8_decode_levels(_rows(pairs)).view(-1, 2)
    outlier = [min((8 + c % 8) << (c // 8 + 4), 1 << 15) if c else 0 for c in range(128)]
    signed = torch.tensor(outlier + [-level for level in outlier])
    normal = torch.tensor([byte - 256 if byte > 128 else byte for byte in range(256)])
    normal[128] = 0
    for this, other in ((0, 1), (1, 0)):
        byte, partner = pairs[:, this].long(), pairs[:, other]
        expected = torch.where(partner == 0x80, signed[byte], normal[byte])
        assert torch.equal(levels[:, this].long(), expected)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_valid_pair_round_trips(pairing: Pairing) -> None:
    pairs, valid = _pairs()
    assert int(valid.sum()) == 255**2 + 2 * 128
    codes = _rows(pairs[valid])
    weight = ovp8_decode(codes, ONE, codes.shape[1], 0)
    assert len(torch.unique(weight.view(-1, 2), dim=0)) == int(valid.sum())
    assert torch.equal(ovp8_encode(weight, ONE, 0, pairing), codes)


def test_validator_rejects_exactly_the_invalid_pairs() -> None:
    pairs, valid = _pairs()
    codes = _rows(pairs[valid])
    ovp8_validate(codes, ONE, out_features=1, in_features=codes.shape[1], group_size=0)
    assert int((~valid).sum()) == 255
    for pair in pairs[~valid]:
        shown = "0x{:02x} 0x{:02x}".format(*pair.tolist())
        with pytest.raises(ValueError, match=rf"fc\.codes: .*got bytes {shown} at \[0, 2\]"):
            ovp8_validate(
                torch.cat((torch.zeros_like(pair), pair))[None],
                ONE,
                out_features=1,
                in_features=4,
                group_size=0,
                name="fc",
            )


def test_pairs_without_an_outlier_decode_to_zeros() -> None:
    codes = torch.tensor([[0x80, 0x80, 0x80, 0x00, 0x00, 0x80]], dtype=torch.uint8)
    assert torch.equal(ovp8_decode(codes, ONE, 6, 0), torch.zeros(1, 6))


def test_pair_choice_is_optimal() -> None:
    """Against all valid pairs: the best normal and the best outlier by exhaustion, then all partners."""
    generator = torch.Generator().manual_seed(3)
    t = torch.randn(4000, 2, generator=generator) * torch.logspace(0, 4.6, 4000)[:, None]
    t = torch.cat((t, torch.tensor([[135.5, 0.0], [127.5, 127.5], [150.0, 150.0], [-4e4, 3e4]])))
    normal = torch.arange(-127, 128, dtype=torch.float64)
    outlier = abfloat_magnitude(torch.arange(1, 0x41)).double()
    outlier = torch.cat((outlier, -outlier))

    def least(values: Tensor, levels: Tensor) -> Tensor:
        return ((values.double()[:, None] - levels) ** 2).amin(1)

    a, b = t.unbind(-1)
    best = torch.stack(
        (
            least(a, normal) + least(b, normal),
            least(a, outlier) + b.double() ** 2,
            a.double() ** 2 + least(b, outlier),
        )
    ).amin(0)
    codes = ovp8_encode(_rows(t), ONE, 0)
    ours = ((t.double() - ovp8_decode(codes, ONE, t.numel(), 0).view(-1, 2)) ** 2).sum(-1)
    tolerance = 8 * 2.0**-24 * (t.double() ** 2).sum(-1)  # as for four bits: roundings of the compared errors
    assert bool((ours <= best + tolerance).all())


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((2.5, -3.5), "02 fc"),  # ties to even
        ((-135.5, 0.0), "81 00"),  # -127 and -144 are equally far: normal goes first
        ((150.0, 150.0), "7f 7f"),
        ((200.0, 200.0), "7f 7f"),  # clipping both costs less than losing one
        ((1000.0, 1000.0), "18 80"),  # (outlier, victim) goes before (victim, outlier)
        ((1e6, 1.0), "40 80"),
        ((-0.4, -0.0), "00 00"),
    ],
)
def test_ties_and_limits(pair: tuple[float, float], expected: str) -> None:
    codes = ovp8_encode(torch.tensor([pair]), ONE, 0)
    assert bytes(codes[0].tolist()).hex(" ") == expected


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((135.5, 100.0), "7f 64"),  # on the threshold between 127 and 144: normal
        ((136.0, 100.0), "01 80"),
        ((200.0, -300.0), "80 89"),  # the larger magnitude stays; 300 is nearer to 288 than to 320
        ((200.0, -200.0), "04 80"),
    ],
)
def test_paper_pairing(pair: tuple[float, float], expected: str) -> None:
    codes = ovp8_encode(torch.tensor([pair]), ONE, 0, "paper")
    assert bytes(codes[0].tolist()).hex(" ") == expected


@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_odd_k_gets_one_pad_column(group_size: int) -> None:
    weight = torch.rand(2, 33, generator=torch.Generator().manual_seed(4)) * 2.4 - 1.2  # no outliers
    groups, rows = (2 if group_size > 0 else 1), (1 if group_size == 0 else 2)
    scale = pack_scale(torch.full((rows, groups), 0.01), torch.zeros(rows, groups, dtype=torch.bool))
    codes = ovp8_encode(weight, scale, group_size)
    assert codes.shape == (2, 34)
    assert codes[:, 33].tolist() == [0, 0]
    decoded = ovp8_decode(codes, scale, 33, group_size)
    assert decoded.shape == (2, 33)
    assert bool(((decoded - weight).abs() <= 0.5 * 0.0101).all())  # half a step; 0.01 is stored as 0.01001


# The validator


def _validate(codes: Tensor, scale: Tensor) -> None:
    ovp8_validate(codes, scale, out_features=3, in_features=5, group_size=-1, name="fc")


def test_validate_rejects_other_types_and_shapes() -> None:
    codes, scale = torch.zeros(3, 6, dtype=torch.uint8), ONE.expand(3, 1)
    _validate(codes, scale)
    with pytest.raises(TypeError, match=re.escape("fc.codes: expected torch.uint8, got torch.int8")):
        _validate(codes.to(torch.int8), scale)
    with pytest.raises(TypeError, match=re.escape("fc.scale: expected torch.int16, got torch.float32")):
        _validate(codes, scale.float())
    with pytest.raises(ValueError, match=re.escape("fc.codes: expected shape (3, 6), got (3, 5)")):
        _validate(codes[:, :5], scale)
    with pytest.raises(ValueError, match=re.escape("fc.scale: expected shape (3, 1), got (1, 1)")):
        _validate(codes, scale[:1])


@pytest.mark.parametrize("pattern", [0x0000, 0x7F80, 0x7FC0, 0x3F81, 0xBF80 - 0x10000])
def test_validate_rejects_bad_scales(pattern: int) -> None:
    codes, scale = torch.zeros(3, 6, dtype=torch.uint8), ONE.repeat(3, 1)
    scale[1] = pattern
    with pytest.raises(ValueError, match=r"fc\.scale: expected positive finite scales without rule bits"):
        _validate(codes, scale)
