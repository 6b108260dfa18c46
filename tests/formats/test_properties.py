"""Properties of the format on generated weights: idempotence, error bounds, symmetries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from olive import ops
from olive.formats import (
    CODEBOOKS,
    GROUP_SIZES,
    PAIRINGS,
    Codebook,
    Pairing,
    get_codebook,
    ovp4_decode,
    ovp4_encode,
    ovp4_validate,
    ovp8_decode,
    ovp8_encode,
    ovp8_validate,
    pack_scale,
    scale_shape,
    unpack_scale,
)
from olive.formats.ovp4 import INVALID_PAIRS, PairTables

BOOKS = st.sampled_from(list(CODEBOOKS.values()))
GROUPS = st.sampled_from(GROUP_SIZES)
PAIRING = st.sampled_from(PAIRINGS)
VALID = [byte for byte in range(256) if byte not in INVALID_PAIRS]
PAIR_GRID, PLAIN_GRID = [0.5, 0.7, 0.9, 1.1], [0.7, 0.85, 1.0]
CPU = torch.device("cpu")


@st.composite
def weights(draw: st.DrawFn, largest: float = 1e3) -> Tensor:
    """float32 [N, K], N in 1..3, K in 1..140: normal samples of mixed spread, some values put in."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight * 10 ** (torch.rand(rows, 1, generator=generator) * 2 - 1)
    magnitude = st.floats(1e-3, largest)
    value = st.one_of(st.just(0.0), magnitude, magnitude.map(lambda x: -x))
    for place, put in draw(st.lists(st.tuples(st.integers(0, 10**6), value), max_size=8)):
        weight.view(-1)[place % weight.numel()] = put
    return weight


@st.composite
def stored(
    draw: st.DrawFn, book: Codebook, rows: int, columns: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Any valid codes and scales, with exponents that leave 1 / scale and the products in range."""
    shape = scale_shape(rows, columns, group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    value = (1 + torch.rand(shape, generator=generator)) * 2.0 ** torch.randint(
        -100, 100, shape, generator=generator
    )
    plain = torch.rand(shape, generator=generator) < (0.5 if book.has_plain else 0.0)
    sign = torch.where(plain & (torch.rand(shape, generator=generator) < 0.5), -1.0, 1.0)
    scale = pack_scale(value * sign, plain)
    pairs = (columns + 1) // 2
    codes = torch.tensor(VALID, dtype=torch.uint8)[torch.randint(253, (rows, pairs), generator=generator)]
    return codes, scale


@given(data=st.data(), book=BOOKS, group_size=GROUPS, pairing=PAIRING, half=st.integers(1, 70))
def test_encoding_a_decoded_weight_gives_its_codes(
    data: st.DataObject, book: Codebook, group_size: int, pairing: Pairing, half: int
) -> None:
    codes, scale = data.draw(stored(book, 2, 2 * half, group_size))
    ovp4_validate(codes, scale, book.tensor(), out_features=2, in_features=2 * half, group_size=group_size)
    weight = ovp4_decode(codes, scale, book, 2 * half, group_size)
    assert torch.equal(ovp4_encode(weight, scale, book, group_size, pairing), codes)


@given(weight=weights(), book=BOOKS, group_size=GROUPS, pairing=PAIRING)
def test_quantized_weights_are_valid_and_stay_as_they_are(
    weight: Tensor, book: Codebook, group_size: int, pairing: Pairing
) -> None:
    rows, columns = weight.shape
    codes, scale = ops.ovp_quantize(weight, book.tensor(), group_size, pairing, PAIR_GRID, PLAIN_GRID, None)
    ovp4_validate(codes, scale, book.tensor(), out_features=rows, in_features=columns, group_size=group_size)
    decoded = ovp4_decode(codes, scale, book, columns, group_size)
    assert torch.equal(ovp4_encode(decoded, scale, book, group_size, pairing), codes)


@given(weight=weights(), book=BOOKS)
def test_error_is_at_most_that_of_rounding_and_clipping(weight: Tensor, book: Codebook) -> None:
    """The optimal pair is never worse than two normals, whose errors are half a gap or the clipped part."""
    scale = pack_scale(
        weight.abs().amax(1, keepdim=True).clamp(min=0.01) / 20, torch.zeros(len(weight), 1).bool()
    )
    value = unpack_scale(scale)[0].double()
    decoded = ovp4_decode(ovp4_encode(weight, scale, book, -1), scale, book, weight.shape[1], -1)
    t = torch.nn.functional.pad(weight.double() / value, (0, weight.shape[1] % 2))
    error = torch.nn.functional.pad((decoded - weight.double()) / value, (0, weight.shape[1] % 2)) ** 2
    half_gap = max(b - a for a, b in zip(book.normal, book.normal[1:], strict=False)) / 2
    bound = (t.abs() - book.normal[7]).clamp(min=half_gap) ** 2
    assert bool((error.view(-1, 2).sum(1) <= bound.view(-1, 2).sum(1) * (1 + 1e-5)).all())


@given(weight=weights(), data=st.data())
def test_plain_error_is_at_most_half_a_gap_or_the_clipped_part(weight: Tensor, data: st.DataObject) -> None:
    book = get_codebook("adaptive")
    sign = data.draw(st.sampled_from((-1.0, 1.0)))
    largest = weight.abs().amax(1, keepdim=True).clamp(min=0.01)
    scale = pack_scale(sign * largest / 127, torch.ones(len(weight), 1).bool())
    value = unpack_scale(scale)[0].double()
    decoded = ovp4_decode(ovp4_encode(weight, scale, book, -1), scale, book, weight.shape[1], -1)
    clipped = weight.double().abs() - 127 * value.abs()
    bound = torch.maximum(clipped, 19.5 * value.abs())  # the widest gap, -127 to -88
    assert bool(((decoded - weight.double()).abs() <= bound * (1 + 1e-5)).all())


def _mirrored(codes: Tensor) -> Tensor:
    """Flip the sign of every nibble but 0 and the identifier."""
    low, high = codes & 15, codes >> 4

    def flip(nibble: Tensor) -> Tensor:
        return torch.where(nibble % 8 == 0, nibble, nibble ^ 8)

    return flip(low) | (flip(high) << 4)


@given(
    weight=weights(),
    book=st.sampled_from([book for book in CODEBOOKS.values() if not book.has_plain]),
    group_size=GROUPS,
    pairing=PAIRING,
)
def test_pair_rule_is_symmetric_in_sign(
    weight: Tensor, book: Codebook, group_size: int, pairing: Pairing
) -> None:
    arguments = (book.tensor(), group_size, pairing, PAIR_GRID, [], None)
    codes, scale = ops.ovp_quantize(weight, *arguments)
    negated_codes, negated_scale = ops.ovp_quantize(-weight, *arguments)
    assert torch.equal(negated_scale, scale)
    assert torch.equal(negated_codes, _mirrored(codes))


@given(weight=weights(), group_size=GROUPS)
def test_a_plain_group_is_mirrored_by_a_negative_scale(weight: Tensor, group_size: int) -> None:
    book = get_codebook("adaptive")
    shape = scale_shape(*weight.shape, group_size)
    scale = pack_scale(torch.full(shape, 0.02), torch.ones(shape, dtype=torch.bool))
    negative = pack_scale(torch.full(shape, -0.02), torch.ones(shape, dtype=torch.bool))
    codes = ovp4_encode(weight, scale, book, group_size)
    assert torch.equal(ovp4_encode(-weight, negative, book, group_size), codes)
    decoded = ovp4_decode(codes, scale, book, weight.shape[1], group_size)
    assert torch.equal(ovp4_decode(codes, negative, book, weight.shape[1], group_size), -decoded)


@given(weight=weights(), book=BOOKS, group_size=GROUPS, pairing=PAIRING, power=st.integers(-30, 30))
def test_a_power_of_two_only_moves_the_scale(
    weight: Tensor, book: Codebook, group_size: int, pairing: Pairing, power: int
) -> None:
    arguments = (book.tensor(), group_size, pairing, PAIR_GRID, PLAIN_GRID, None)
    codes, scale = ops.ovp_quantize(weight, *arguments)
    scaled_codes, scaled = ops.ovp_quantize(weight * 2.0**power, *arguments)
    assert torch.equal(scaled_codes, codes)
    (value, plain), (scaled_value, scaled_plain) = unpack_scale(scale), unpack_scale(scaled)
    assert torch.equal(scaled_plain, plain)
    zero_group = (value == 1.0) & (scaled_value == 1.0)  # a group of zeros keeps scale 1
    assert torch.equal(torch.where(zero_group, 1.0, value * 2.0**power), scaled_value)


@given(weight=weights(), book=BOOKS, pairing=PAIRING, data=st.data())
def test_rows_and_pairs_are_encoded_independently(
    weight: Tensor, book: Codebook, pairing: Pairing, data: st.DataObject
) -> None:
    weight = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2))
    rows, pairs = weight.shape[0], weight.shape[1] // 2
    row_order = torch.tensor(data.draw(st.permutations(range(rows))))
    pair_order = torch.tensor(data.draw(st.permutations(range(pairs))))
    plain = torch.full((rows, 1), book.has_plain)
    plain[::2] = False
    scale = pack_scale(torch.linspace(0.05, 0.15, rows)[:, None], plain)
    codes = ovp4_encode(weight, scale, book, -1, pairing)
    moved = weight.view(rows, pairs, 2)[row_order][:, pair_order].reshape(rows, -1)
    assert torch.equal(
        ovp4_encode(moved, scale[row_order], book, -1, pairing), codes[row_order][:, pair_order]
    )


@given(weight=weights(), group_size=GROUPS, book=BOOKS, data=st.data())
def test_rows_are_quantized_independently(
    weight: Tensor, group_size: int, book: Codebook, data: st.DataObject
) -> None:
    assume(group_size != 0)
    order = torch.tensor(data.draw(st.permutations(range(len(weight)))))
    arguments = (book.tensor(), group_size, "optimal", PAIR_GRID, PLAIN_GRID, None)
    codes, scale = ops.ovp_quantize(weight, *arguments)
    moved_codes, moved_scale = ops.ovp_quantize(weight[order], *arguments)
    assert torch.equal(moved_codes, codes[order])
    assert torch.equal(moved_scale, scale[order])


@given(weight=weights(), book=BOOKS, pairing=PAIRING)
def test_swapping_the_columns_of_a_pair_keeps_its_error(
    weight: Tensor, book: Codebook, pairing: Pairing
) -> None:
    t = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2)) * 8
    swapped = t.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    tables = PairTables(book, CPU)
    codes, error = tables.encode_pair_rule(t, pairing)
    swapped_codes, swapped_error = tables.encode_pair_rule(swapped, pairing)
    a, b = t.unflatten(1, (-1, 2)).unbind(-1)
    tied = a.abs() == b.abs()
    assert torch.equal(error, swapped_error)
    assert torch.equal(((codes >> 4) | (codes << 4))[~tied], swapped_codes[~tied])


@given(weight=weights(largest=1e5), group_size=GROUPS, pairing=PAIRING)
def test_eight_bit_codes_are_valid_and_stay_as_they_are(
    weight: Tensor, group_size: int, pairing: Pairing
) -> None:
    rows, columns = weight.shape
    shape = scale_shape(rows, columns, group_size)
    scale = pack_scale(torch.full(shape, 0.013), torch.zeros(shape, dtype=torch.bool))
    codes = ovp8_encode(weight, scale, group_size, pairing)
    ovp8_validate(codes, scale, out_features=rows, in_features=columns, group_size=group_size)
    decoded = ovp8_decode(codes, scale, columns, group_size)
    assert torch.equal(ovp8_encode(decoded, scale, group_size, pairing), codes)
    mirrored = ovp8_decode(ovp8_encode(-weight, scale, group_size, pairing), scale, columns, group_size)
    assert torch.equal(mirrored, -decoded)


@pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)
def test_groups_of_zeros_get_scale_one_and_the_pair_rule(book: Codebook) -> None:
    weight = torch.zeros(2, 70)
    weight[1, 33] = 0.5
    weight[0, :32] = 2.0**-61  # below the threshold: counts as zero
    codes, scale = ops.ovp_quantize(weight, book.tensor(), 32, "optimal", PAIR_GRID, PLAIN_GRID, None)
    value, plain = unpack_scale(scale)
    alone = torch.tensor([[False] * 3, [False, True, False]])
    assert torch.equal(value[~alone], torch.ones(5))
    assert not bool(plain[~alone].any())
    assert torch.equal(codes[0], torch.zeros(35, dtype=torch.uint8))
    assert bool((ovp4_decode(codes, scale, book, 70, 32)[weight == 0] == 0).all())


@pytest.mark.parametrize("exponent", [-59, -40, 0, 60, 110])
@pytest.mark.parametrize("book", CODEBOOKS.values(), ids=lambda book: book.name)
def test_relative_error_does_not_depend_on_the_magnitude(book: Codebook, exponent: int) -> None:
    """Down to the threshold for zero groups, and where squares overflow float32 and sigma with them."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight = weight + weight.sign()

    def error(weight: Tensor) -> Tensor:
        codes, scale = ops.ovp_quantize(weight, book.tensor(), 32, "optimal", PAIR_GRID, PLAIN_GRID, None)
        decoded = ovp4_decode(codes, scale, book, 64, 32)
        return (decoded.double() - weight.double()).square().sum() / weight.double().square().sum()

    assert error(weight * 2.0**exponent) <= 1.1 * error(weight)
