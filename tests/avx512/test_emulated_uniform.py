"""uniform_linear on the kernels for AVX-512 and VNNI, emulated: the bits of the portable ones."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from olive.ops.cpu_uniform import uniform_linear_cpu
from olive.ops.uniform import uniform_linear_reference
from tests.avx512.module import EMULATED_ISAS, NEEDS_EMULATOR
from tests.ops.cpu_cases import DTYPES
from tests.ops.uniform_cases import NOT_QUANTIZED, uniform_case

pytestmark = NEEDS_EMULATOR
SHAPES = ((1, 5, 45), (5, 6, 256), (3, 9, 300), (1, 3, 1025))  # M, N, K


@pytest.mark.parametrize("isa", EMULATED_ISAS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bits_are_those_of_the_portable_kernels(bits: int, isa: str, emulated: ModuleType) -> None:
    for turn, (m, n, k) in enumerate(SHAPES):
        for group_size in (-1, (32, 64, 96, 128)[turn]):
            case = uniform_case(n, k, bits, bool(turn % 2), group_size)
            x, bias = torch.randn(m, k).to(DTYPES[turn % 3]), torch.randn(n)
            levels = [(torch.full((1,), 0.05), torch.randn(k), 8, signed) for signed in (True, False)]
            for how in (NOT_QUANTIZED, *levels, (torch.full((1,), 0.3), None, 1, True)):
                found = uniform_linear_cpu(x, *case.arguments(bias), *how, isa)
                assert torch.equal(found, uniform_linear_cpu(x, *case.arguments(bias), *how, "portable"))
                if group_size == -1 and how is not NOT_QUANTIZED:
                    assert torch.equal(found, uniform_linear_reference(x, *case.arguments(bias), *how))
