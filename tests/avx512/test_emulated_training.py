"""The operators of training on the emulated instruction sets: the reference's bits."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.avx512.module import NEEDS_EMULATOR
from tests.ops.cpu_cases import DTYPES
from tests.ops.test_cpu_training import check_lsq, check_oscillation, check_statsq, unusual

pytestmark = NEEDS_EMULATOR
EACH_ISA = pytest.mark.parametrize("isa", ["avx512", "amx"])  # the others take these functions from avx512
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH_ISA
@EACH_DTYPE
def test_statsq_gives_the_references_bits(dtype: torch.dtype, isa: str, emulated: ModuleType) -> None:
    for group_size in (-1, 13, 64):
        check_statsq(unusual(20, 203, dtype), 4, group_size, isa)


@EACH_ISA
@EACH_DTYPE
def test_lsq_gives_the_references_bits(dtype: torch.dtype, isa: str, emulated: ModuleType) -> None:
    input, grad = torch.randn(5, 70, 3).to(dtype), torch.randn(5, 70, 3).to(dtype)
    for dim, size in ((0, 1), (0, 5), (1, 70), (2, 3)):
        for bits, signed in ((1, True), (4, False)):
            check_lsq(input, grad, 0.1 + torch.rand(size), bits, signed, dim, isa)
    check_lsq(unusual(20, 203, dtype), unusual(20, 203, dtype), torch.ones(1), 4, True, 0, isa)


@EACH_ISA
@EACH_DTYPE
def test_oscillations_are_the_references(dtype: torch.dtype, isa: str, emulated: ModuleType) -> None:
    for offset, qmin, qmax in ((0.0, -8, 7), (0.5, 1, 15)):
        check_oscillation(unusual(20, 203, dtype), 0.1 + torch.rand(20, 4), offset, qmin, qmax, isa)
