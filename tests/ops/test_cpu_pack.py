"""Packing for the CPU kernels: the reference's bytes, and back without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olive.formats import GROUP_SIZES
from olive.ops import cpu, reference
from olive.ops.packed import CPU_LAYOUT
from tests.ops.cpu_cases import NEEDS_KERNELS, random_weight, strided

pytestmark = NEEDS_KERNELS
SHAPES = ((1, 1), (1, 9), (15, 8), (16, 128), (17, 5), (33, 130), (48, 257), (2, 1030))


def _check(rows: int, columns: int, group_size: int) -> None:
    codes, scale, _ = random_weight(rows, columns, group_size, "adaptive")
    packed = cpu.ovp_pack_cpu(codes, scale, columns, group_size)
    expected = reference.ovp_pack_reference(codes, scale, columns, group_size)
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[1], expected[1])
    back = cpu.ovp_unpack_cpu(*packed, rows, columns, group_size)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_equals_the_reference_and_unpack_restores(shape: tuple[int, int], group_size: int) -> None:
    _check(*shape, group_size)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(GROUP_SIZES))
def test_any_shape_packs_as_the_reference(rows: int, columns: int, group_size: int) -> None:
    _check(rows, columns, group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_everything_past_the_ends_is_zero(group_size: int) -> None:
    """Unpacking as if the padding were rows and columns shows it."""
    rows, columns = 5, 37
    codes, scale, _ = random_weight(rows, columns, group_size, "adaptive")
    packed_codes, packed_scale = cpu.ovp_pack_cpu(codes, scale, columns, group_size)
    all_columns = CPU_LAYOUT.codes_shape(rows, columns, group_size)[1] * 8
    assert all_columns > columns
    wide, _ = cpu.ovp_unpack_cpu(packed_codes, packed_scale, 16, all_columns, group_size)
    assert not wide[rows:].any()
    assert not wide[:, codes.shape[1] :].any()
    assert not packed_scale[..., rows:].any()


def test_inputs_need_not_be_contiguous() -> None:
    codes, scale, _ = random_weight(19, 70, 32, "adaptive")
    expected = reference.ovp_pack_reference(codes, scale, 70, 32)
    packed = cpu.ovp_pack_cpu(strided(codes), strided(scale), 70, 32)
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[1], expected[1])
    back = cpu.ovp_unpack_cpu(strided(packed[0]), strided(packed[1]), 19, 70, 32)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)


def test_large_buffers_that_get_huge_pages_pack_alike() -> None:
    rows, columns = 256, 33000  # 4.2 MB of codes: a huge page lies inside
    codes, scale, _ = random_weight(rows, columns, 128, "adaptive")
    packed = cpu.ovp_pack_cpu(codes, scale, columns, 128)
    expected = reference.ovp_pack_reference(codes, scale, columns, 128)
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[1], expected[1])


def test_the_operators_run_the_kernels() -> None:
    codes, scale, _ = random_weight(19, 70, 32, "adaptive")
    packed = torch.ops.olive.ovp_pack(codes, scale, 70, 32)
    expected = reference.ovp_pack_reference(codes, scale, 70, 32)
    assert torch.equal(packed[0], expected[0])
    back = torch.ops.olive.ovp_unpack(*packed, 19, 70, 32)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)
