"""`ovp_decode_triton` gives the reference's values, bit for bit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from olive.formats import GROUP_SIZES
from olive.ops.reference import ovp_decode_reference
from tests.kernels.conftest import in_turn
from tests.ops.cpu_cases import BOOKS, random_weight, strided

# One value; a pair; odd; ragged groups; more rows and columns than a block.
SHAPES = ((1, 1), (2, 2), (5, 7), (3, 130), (9, 715))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_equal_the_reference(
    kernels: ModuleType, device: str, shape: tuple[int, int], group_size: int, dtype: torch.dtype
) -> None:
    rows, columns = shape
    for book in in_turn(list(BOOKS), SHAPES.index(shape) + GROUP_SIZES.index(group_size)):
        stored = random_weight(rows, columns, group_size, book)
        expected = ovp_decode_reference(*stored, columns, group_size, dtype)
        on_device = [tensor.to(device) for tensor in stored]
        found = kernels.ovp_decode_triton(*on_device, columns, group_size, dtype)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(found.cpu(), expected)


def test_every_byte_decodes_under_both_rules(kernels: ModuleType, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scale = torch.tensor([[0x3F80], [0xBF81 - 0x10000]], dtype=torch.int16)  # 1; -1 under the plain rule
    for book in BOOKS.values():
        stored = (codes, scale, book.tensor())
        expected = ovp_decode_reference(*stored, 512, -1, torch.float32)
        found = kernels.ovp_decode_triton(*(t.to(device) for t in stored), 512, -1, torch.float32)
        assert torch.equal(found.cpu(), expected)


def test_inputs_need_not_be_contiguous(kernels: ModuleType, device: str) -> None:
    stored = random_weight(4, 90, 32, "adaptive")
    expected = ovp_decode_reference(*stored, 90, 32, torch.float32)
    found = kernels.ovp_decode_triton(*(strided(t).to(device) for t in stored), 90, 32, torch.float32)
    assert torch.equal(found.cpu(), expected)
