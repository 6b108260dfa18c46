"""Uniform grids: packed codes come back, levels are those of either grid, bad tensors are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olive.formats.uniform import (
    doubled_zero,
    expand_uniform_scale,
    pack_codes,
    storage_bits,
    uniform_codes_shape,
    uniform_decode_values,
    uniform_scale_shape,
    uniform_validate,
    unpack_codes,
)

BITS = range(1, 9)


def test_storage_is_the_next_width() -> None:
    assert [storage_bits(bits) for bits in BITS] == [2, 2, 4, 4, 8, 8, 8, 8]


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**16))
def test_pack_round_trip_is_exact(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == uniform_codes_shape(rows, columns, bits)
    assert torch.equal(unpack_codes(packed, columns, bits), codes)
    scale = torch.rand(uniform_scale_shape(rows, columns, 32), generator=generator)
    size = {"out_features": rows, "in_features": columns}
    uniform_validate(packed, scale, **size, bits=bits, group_size=32)


def test_lowest_bits_come_first() -> None:
    assert pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_codes(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 1]]
    assert pack_codes(torch.tensor([[1, 200]], dtype=torch.uint8), 8).tolist() == [[1, 200]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing_packs_to_nothing(shape: tuple[int, int]) -> None:
    packed = pack_codes(torch.zeros(shape, dtype=torch.uint8), 3)
    assert packed.numel() == 0
    assert unpack_codes(packed, shape[1], 3).shape == shape


def test_strided_codes_pack_alike() -> None:
    codes = torch.randint(4, (5, 22), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes[:, ::2], 2), pack_codes(codes[:, ::2].contiguous(), 2))


@pytest.mark.parametrize("bits", BITS)
def test_levels_of_both_grids(bits: int) -> None:
    count = 2**bits
    codes = torch.arange(count).to(torch.uint8)[None]
    one = torch.ones(1, 1)
    packed = pack_codes(codes, bits)
    rise = uniform_decode_values(packed, one, count, bits, True, -1)[0]
    tread = uniform_decode_values(packed, one, count, bits, False, -1)[0]
    assert torch.equal(rise, torch.arange(count) - (count - 1) / 2)
    assert torch.equal(rise, -rise.flip(0)), "mid-rise grids are symmetric"
    assert torch.equal(tread, torch.arange(count) - count / 2)
    assert (doubled_zero(bits, True), doubled_zero(bits, False)) == (count - 1, count)


def test_each_group_has_its_scale() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expand_uniform_scale(scale, 5, 3).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    assert expand_uniform_scale(scale[:, :1], 2, -1).tolist() == [[1, 1], [3, 3]]


def test_bad_codes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"codes: expected torch\.uint8, got torch\.int8"):
        pack_codes(torch.zeros(1, 2, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"codes: expected shape \[N, K\], got \(2,\)"):
        pack_codes(torch.zeros(2, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="codes: expected 0 to 7 for 3 bits, got 8"):
        pack_codes(torch.full((1, 2), 8, dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match=r"codes: expected torch\.uint8, got torch\.float32"):
        unpack_codes(torch.zeros(1, 2), 4, 4)
    with pytest.raises(ValueError, match=r"codes: expected shape \[N, 2\], got \(1, 3\)"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits: expected 1 to 8, got {bits}"):
        storage_bits(bits)


@pytest.mark.parametrize("group_size", [0, -2])
def test_bad_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"group_size: expected -1 per channel, or columns, got {group_size}"
    ):
        uniform_scale_shape(1, 8, group_size)


def test_bad_stored_tensors_are_refused() -> None:
    size = {"out_features": 2, "in_features": 5, "group_size": 4, "name": "proj"}
    codes, scale = torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 2)
    uniform_validate(codes, scale, **size, bits=3)
    with pytest.raises(TypeError, match=r"proj\.scale: expected torch\.float32, got torch\.float16"):
        uniform_validate(codes, scale.half(), **size, bits=3)
    with pytest.raises(ValueError, match=r"proj\.codes: expected shape \(2, 3\), got \(2, 4\)"):
        uniform_validate(codes.new_zeros(2, 4), scale, **size, bits=3)
    for value in (float("nan"), float("inf"), -1.0):
        bad = scale.clone()
        bad[1, 0] = value
        with pytest.raises(
            ValueError, match=r"proj\.scale: expected finite scales of at least 0, got .*\[1, 0\]"
        ):
            uniform_validate(codes, bad, **size, bits=3)
    for byte, place in ((0x08, 0), (0x80, 1), (0x10, 2)):  # a fourth bit, low and high; a code past K
        bad = codes.clone()
        bad[1, place] = byte
        with pytest.raises(ValueError, match=rf"proj\.codes: .* got byte 0x{byte:02x} at \[1, {place}\]"):
            uniform_validate(bad, scale, **size, bits=3)
