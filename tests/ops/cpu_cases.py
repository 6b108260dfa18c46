"""Inputs shared by the tests of the CPU kernels, and the mark that runs a test for every instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from olive.formats import CODEBOOKS, Codebook, codes_shape, scale_shape
from olive.ops import cpu

ISAS = cpu.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEEDS_KERNELS = pytest.mark.skipif(not ISAS, reason="olive._cpu is not built")
EACH_ISA = pytest.mark.parametrize("isa", ISAS or ["none"])

# Beside the fixed codebooks: tables as fitting makes them, with gaps, neighbours and the largest levels.
BOOKS = {
    **CODEBOOKS,
    "fitted": Codebook(
        "fitted",
        (0, 1, 5, 6, 20, 40, 63, 64),
        (0, 65, 66, 90, 100, 125, 126, 127),
        (-127, -126, -100, -50, -49, -20, -3, -1, 0, 1, 17, 30, 60, 61, 126, 127),
    ),
}


@cache
def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Float32 [rows, columns], Student-t with 3 degrees of freedom, mixed signs; do not write to it."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, rows, columns, generator=generator)
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()


@cache
def random_weight(
    rows: int, columns: int, group_size: int, name: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and codebook of a weight that uses every byte value and, where there is one, both rules.

    Scales are within a factor of 16 of 1/1000 and of both signs. Do not write to the results.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, codes_shape(rows, columns), dtype=torch.uint8, generator=generator)
    if columns % 2:
        codes[:, -1] &= 15  # the pad column of an odd K holds zeros
    shape = scale_shape(rows, columns, group_size)
    values = 1e-3 * torch.exp2(8 * torch.rand(shape, generator=generator) - 4)
    values *= torch.randint(2, shape, generator=generator) * 2 - 1
    scale = (values.view(torch.int32) >> 16).short() & ~1
    if BOOKS[name].has_plain:
        scale |= torch.randint(2, shape, generator=generator).short()
    return codes, scale, BOOKS[name].tensor()


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them in memory: whoever takes the address alone reads wrong ones."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]
