"""Quantized activations and 8-bit weights on the emulated instruction sets: the reference's bits."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from olive.formats import GROUP_SIZES
from olive.ops import cpu_quantized, reference_quantized
from tests.avx512.module import EMULATED_ISAS, NEEDS_EMULATOR
from tests.ops.cpu_cases import DTYPES, heavy_tailed, random_weight
from tests.ops.fixed_point import assert_same_bits
from tests.ops.test_cpu_quantized import activations, codebook, static_scale

pytestmark = NEEDS_EMULATOR
EACH_ISA = pytest.mark.parametrize("isa", EMULATED_ISAS)
ROWS = (1, 3, 8, 9, 13, 16, 17, 33, 100)


@EACH_ISA
@pytest.mark.parametrize("rows", ROWS)
def test_linear_equals_the_reference(rows: int, isa: str, emulated: ModuleType) -> None:
    for turn, group_size in enumerate(GROUP_SIZES, start=rows):
        activation_group_size = GROUP_SIZES[turn % len(GROUP_SIZES)]
        codes, scale, table = random_weight(50, 300, group_size, "adaptive", seed=turn)
        x = activations(rows, 300, DTYPES[turn % 3])
        format, of_x = ("ovp4", codebook("int4")) if turn % 2 else ("int8", None)
        static = static_scale(0.03) if activation_group_size == 0 else None
        weight = (codes, scale, table, torch.linspace(-1, 1, 50), 50, group_size)
        how = (format, activation_group_size, "optimal", of_x, static)
        found = cpu_quantized.ovp_linear_quantized_cpu(x, *weight, *how, isa)
        assert_same_bits(found, reference_quantized.ovp_linear_quantized_reference(x, *weight, *how))


@EACH_ISA
@pytest.mark.parametrize("format", ["int8", "ovp4", "ovp8"])
def test_levels_equal_the_reference(format: str, isa: str, emulated: ModuleType) -> None:
    x = activations(7, 203, torch.float32)
    table = codebook("adaptive") if format == "ovp4" else None
    for group_size in (-1, 0, 64):
        static = static_scale(0.07) if group_size == 0 else None
        how = (format, group_size, "optimal", table, static, torch.bfloat16)
        levels, scale = cpu_quantized.quantize_activations_cpu(x, *how, isa)
        expected, expected_scale = reference_quantized.quantize_activations_reference(x, *how)
        assert torch.equal(levels, expected)
        assert_same_bits(scale, expected_scale)


@EACH_ISA
def test_eight_bits_equal_the_reference(isa: str, emulated: ModuleType) -> None:
    weight = heavy_tailed(9, 203).clone()
    weight[:, 70] *= 50
    for group_size in GROUP_SIZES:
        how = (group_size, "optimal", [0.75, 1.0, 2.0, 8.0])
        codes, scale = cpu_quantized.ovp8_quantize_cpu(weight, *how, isa)
        expected = reference_quantized.ovp8_quantize_reference(weight, *how)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
        size = (203, group_size, torch.float32)
        decoded = cpu_quantized.ovp8_decode_cpu(codes, scale, *size, isa)
        assert_same_bits(decoded, reference_quantized.ovp8_decode_reference(codes, scale, *size))
        x = torch.randn(5, 203)
        found = cpu_quantized.ovp8_linear_cpu(x, codes, scale, None, 9, group_size, isa)
        assert_same_bits(
            found, cpu_quantized.ovp8_linear_cpu(x, codes, scale, None, 9, group_size, "portable")
        )
