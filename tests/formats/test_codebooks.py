"""Codebooks: their tables, their stored form, and what is no codebook."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
import torch

from olive.formats import CODEBOOK_NAMES, CODEBOOKS, Codebook, get_codebook
from olive.formats.codebooks import NF4_PLAIN, NO_PLAIN

NORMAL = (0, 1, 2, 3, 4, 5, 6, 7)
OUTLIER = (0, 12, 16, 24, 32, 48, 64, 96)
NF4 = (  # QLoRA, arXiv:2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def test_names() -> None:
    assert CODEBOOK_NAMES == ("int4", "flint4", "nf4", "adaptive", "learned")
    assert all(get_codebook(name).name == name for name in CODEBOOKS)


def test_plain_levels_are_nf4_rounded_to_int8() -> None:
    assert tuple(round(127 * level) for level in NF4) == NF4_PLAIN


def test_outliers_of_the_paper_are_abfloat_e2m1() -> None:
    def abfloat(bias: int) -> tuple[int, ...]:
        """Magnitudes (2 + mantissa) << (exponent + bias) for codes 1..7, code = 2 exponent + mantissa."""
        return tuple((2 + (code & 1)) << ((code >> 1) + bias) for code in range(1, 8))

    assert get_codebook("int4").outlier[1:] == abfloat(2)
    assert get_codebook("flint4").outlier[1:] == abfloat(3)


@pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)
def test_stored_form_round_trips(book: Codebook) -> None:
    stored = book.tensor()
    assert stored.dtype == torch.int8
    assert stored.shape == (32,)
    assert Codebook.from_tensor(stored, book.name) == book


def test_which_codebooks_are_int8_and_which_have_plain_levels() -> None:
    assert [book.is_int8 for book in CODEBOOKS.values()] == [True, False, True, True]
    assert [book.has_plain for book in CODEBOOKS.values()] == [False, False, False, True]


def test_codebook_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        get_codebook("int4").normal = NORMAL  # type: ignore[misc]


@pytest.mark.parametrize(
    ("normal", "outlier", "plain", "message"),
    [
        (NORMAL[:7], OUTLIER, NO_PLAIN, "normal: expected 8 rising magnitudes"),
        ((1, *NORMAL[1:]), OUTLIER, NO_PLAIN, "normal: expected 8 rising magnitudes"),
        ((0, 2, 1, 3, 4, 5, 6, 7), OUTLIER, NO_PLAIN, "normal: expected 8 rising magnitudes"),
        ((0, 1, 1, 3, 4, 5, 6, 7), OUTLIER, NO_PLAIN, "normal: expected 8 rising magnitudes"),
        (NORMAL, (0, 12, 16, 24, 32, 48, 64, 256), NO_PLAIN, "outlier: expected 8 rising magnitudes"),
        (NORMAL, (5, 12, 16, 24, 32, 48, 64, 96), NO_PLAIN, "outlier: expected 8 rising magnitudes"),
        (
            NORMAL,
            (0, 7, 16, 24, 32, 48, 64, 96),
            NO_PLAIN,
            "outlier: expected every outlier above .* 7, got 7",
        ),
        (NORMAL, OUTLIER, NF4_PLAIN[:15], "plain: expected 16 rising levels"),
        (NORMAL, OUTLIER, NF4_PLAIN[::-1], "plain: expected 16 rising levels"),
        (NORMAL, OUTLIER, (-128, *NF4_PLAIN[1:]), "plain: expected 16 rising levels within -127..127"),
        (NORMAL, OUTLIER, (*NF4_PLAIN[:15], 128), "plain: expected 16 rising levels within -127..127"),
        (NORMAL, OUTLIER, tuple(range(1, 17)), "plain: expected .* that hold 0"),
    ],
)
def test_bad_tables_are_rejected(
    normal: tuple[int, ...], outlier: tuple[int, ...], plain: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"codebook 'mine', {message}"):
        Codebook("mine", normal, outlier, plain)


def test_unknown_name_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"codebook: expected one of int4, .*, got 'int5'"):
        get_codebook("int5")
    with pytest.raises(ValueError, match=r"codebook: expected one of .*, got 'learned'"):
        get_codebook("learned")


def test_bad_stored_codebook_is_rejected() -> None:
    stored = get_codebook("adaptive").tensor()
    with pytest.raises(TypeError, match=re.escape("mlp.codebook: expected int8, got torch.uint8")):
        Codebook.from_tensor(stored.view(torch.uint8), "mlp.codebook")
    with pytest.raises(ValueError, match=re.escape("mlp.codebook: expected shape (32,), got (31,)")):
        Codebook.from_tensor(stored[:31], "mlp.codebook")
    with pytest.raises(ValueError, match=r"mlp\.codebook', normal: expected 8 rising"):
        Codebook.from_tensor(torch.zeros(32, dtype=torch.int8), "mlp.codebook")
    with pytest.raises(ValueError, match=r"mlp\.codebook', plain: expected 16 rising"):
        Codebook.from_tensor(torch.cat((stored[:31], stored[:1])), "mlp.codebook")
