"""Packing for GPUs: the order of matrix fragments, as its description says, and back without loss."""

from __future__ import annotations

import pytest
import torch

from olive.formats import GROUP_SIZES
from olive.ops.packed import CUDA_LAYOUT
from tests.cuda import emulated
from tests.cuda.module import NEEDS_COMPILER
from tests.ops.cpu_cases import random_weight

pytestmark = NEEDS_COMPILER
SHAPES = ((1, 1), (1, 9), (15, 8), (16, 128), (17, 65), (70, 130), (2, 1030))


def test_the_layout_is_the_formula_of_its_description() -> None:
    codes, scale, _ = random_weight(70, 130, 32, "adaptive")
    packed = CUDA_LAYOUT.pack(codes, scale, 130, 32)
    for row in range(70):
        tile, below = divmod(row, 16)
        for byte in range(65):
            step, pair = divmod(byte % 32, 8)
            lane, register = 4 * (below % 8) + pair % 4, below // 8 + 2 * (pair // 4)
            assert packed[0][tile, byte // 32, 16 * lane + 4 * step + register] == codes[row, byte]
        assert torch.equal(packed[1][tile, :, 2 * (below % 8) + below // 8], scale[row])


def _check(rows: int, columns: int, group_size: int) -> None:
    codes, scale, _ = random_weight(rows, columns, group_size, "adaptive")
    packed = emulated.pack(codes, scale, columns, group_size)
    expected = CUDA_LAYOUT.pack(codes, scale, columns, group_size)
    assert torch.equal(packed[0], expected[0])
    assert torch.equal(packed[1], expected[1])
    back = emulated.unpack(*packed, rows, columns, group_size)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_is_the_layout_and_unpack_restores(shape: tuple[int, int], group_size: int) -> None:
    emulated.steer()
    _check(*shape, group_size)


def test_more_tiles_than_threads_pack_alike() -> None:
    emulated.steer(multiprocessors=1)
    _check(64, 4200, 32)


def test_the_bytes_of_a_tile_are_a_permutation_of_its_pairs() -> None:
    """Every pair of a tile marked in turn: each lands on a byte of its own, and comes back from there."""
    emulated.steer()
    scale = torch.zeros(16, 1, dtype=torch.int16)
    numbers = torch.arange(512).view(16, 32)
    low, high = (numbers & 255).to(torch.uint8), (numbers >> 8).to(torch.uint8)
    landed = [emulated.pack(part, scale, 64, -1)[0][0, 0].long() for part in (low, high)]
    assert sorted((landed[0] + 256 * landed[1]).tolist()) == list(range(512))
    tile = torch.zeros(4, 1, 512, dtype=torch.uint8)
    back = []
    for part in (numbers.flatten() & 255, numbers.flatten() >> 8):
        tile[0, 0] = part.to(torch.uint8)
        back.append(emulated.unpack(tile, scale.new_zeros(4, 1, 16), 16, 64, -1)[0].flatten().long())
    place = back[0] + 256 * back[1]  # of the byte that pair i holds
    assert torch.equal((landed[0] + 256 * landed[1])[place], numbers.flatten())
