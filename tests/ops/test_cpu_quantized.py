"""The CPU kernels on quantized activations and on 8-bit weights give the bits of the reference."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from olive.formats import pack_scale
from olive.ops import cpu_quantized as cpu
from olive.ops import reference_quantized as reference
from tests.ops.cpu_cases import BOOKS, DTYPES, EACH_ISA, NEEDS_KERNELS, heavy_tailed, random_weight, strided
from tests.ops.fixed_point import assert_same_bits

pytestmark = NEEDS_KERNELS

GROUPS = (-1, 0, 32, 64, 128)
INT8_BOOKS = [name for name in BOOKS if name != "flint4"]


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Mixed signs, large outliers, a row of zeros, a tiny row; with NaN and Inf among many."""
    x = (50 * heavy_tailed(rows, columns, seed)).clone()
    x[:, columns // 3] *= 60
    if rows > 2:
        x[1] = 0
        x[2] *= 1e-22
    if rows > 5:
        x[4, columns // 2], x[5, 0] = float("nan"), float("-inf")
    return x.to(dtype)


def static_scale(value: float, plain: bool = False) -> Tensor:
    return pack_scale(torch.tensor([value]), torch.tensor([plain]))


@functools.cache
def codebook(name: str) -> Tensor:
    return BOOKS[name].tensor()


@EACH_ISA
@pytest.mark.parametrize("format", ["int8", "ovp4", "ovp8"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_levels_and_scales_are_those_of_the_reference(format: str, group_size: int, isa: str) -> None:
    shapes = [(1, 1), (7, 203), (3, 32), (1, 1100)]
    books = ("int4", "adaptive", "fitted") if format == "ovp4" else (None,)
    for (rows, columns), dtype, book in itertools.product(shapes, DTYPES, books):
        x = activations(rows, columns, dtype)
        static = static_scale(0.07) if group_size == 0 else None
        table = None if book is None else codebook(book)
        pairing = "paper" if columns == 32 else "optimal"
        arguments = (x, format, group_size, pairing, table, static)
        expected, expected_scale = reference.quantize_activations_reference(*arguments, torch.float32)
        for levels_type in (*DTYPES, *(() if format == "ovp8" else (torch.int8,))):
            levels, scale = cpu.quantize_activations_cpu(*arguments, levels_type, isa)
            assert levels.dtype == levels_type
            assert torch.equal(levels.float(), expected)
            assert_same_bits(scale, expected_scale)


@EACH_ISA
def test_static_plain_scale(isa: str) -> None:
    x = activations(4, 70, torch.float32)
    for value in (0.01, -0.01):
        arguments = (
            x,
            "ovp4",
            0,
            "optimal",
            codebook("adaptive"),
            static_scale(value, plain=True),
            torch.int8,
        )
        found = cpu.quantize_activations_cpu(*arguments, isa)
        expected = reference.quantize_activations_reference(*arguments)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("activation_group_size", GROUPS)
def test_linear_gives_the_bits_of_the_reference(
    group_size: int, activation_group_size: int, isa: str
) -> None:
    cases = itertools.cycle(itertools.product(DTYPES, ("int8", "ovp4"), INT8_BOOKS, (True, False)))
    sizes = ((1, 1, 1), (1, 16, 128), (2, 33, 203), (3, 7, 70), (4, 18, 515), (5, 50, 45), (17, 35, 300))
    for rows, outputs, columns in (*sizes, (100, 16, 260)):
        dtype, format, book, has_bias = next(cases)
        codes, scale, table = random_weight(outputs, columns, group_size, book, seed=rows)
        x = activations(rows, columns, dtype, seed=outputs)
        bias = torch.randn(outputs).to(dtype) if has_bias else None
        static = static_scale(0.03) if activation_group_size == 0 else None
        of_x = codebook("int4") if format == "ovp4" else None
        arguments = (x, codes, scale, table, bias, outputs, group_size)
        how = (format, activation_group_size, "optimal", of_x, static)
        found = cpu.ovp_linear_quantized_cpu(*arguments, *how, isa)
        assert_same_bits(found, reference.ovp_linear_quantized_reference(*arguments, *how))


@EACH_ISA
@pytest.mark.parametrize("rows", [1, 2, 6, 8, 9, 11, 12, 13, 31, 33, 97])
def test_every_number_of_rows(rows: int, isa: str) -> None:
    codes, scale, table = random_weight(50, 300, 128, "adaptive", seed=rows)
    x = activations(rows, 300, torch.bfloat16)
    arguments = (x, codes, scale, table, None, 50, 128, "int8", -1, "optimal", None, None)
    found = cpu.ovp_linear_quantized_cpu(*arguments, isa)
    assert_same_bits(found, reference.ovp_linear_quantized_reference(*arguments))


@EACH_ISA
def test_the_largest_sums_are_exact(isa: str) -> None:
    """Levels of 127 everywhere in the longest row that an int32 sum allows."""
    columns = 133_144
    table = codebook("fitted")
    codes = torch.full((2, columns // 2), 0xFF, dtype=torch.uint8)  # plain level 15: 127
    scale = torch.stack([static_scale(1.0, plain=True), static_scale(-1.0, plain=True)])
    x = torch.ones(6, columns)
    x[1::2] = -1
    for rows in (1, 6):
        arguments = (x[:rows], codes, scale, table, None, 2, -1, "int8", -1, "optimal", None, None)
        out = cpu.ovp_linear_quantized_cpu(*arguments, isa)
        assert_same_bits(out, reference.ovp_linear_quantized_reference(*arguments))
        assert torch.allclose(out[0], columns * 127 * torch.tensor([1.0, -1.0]), rtol=1e-6)


@EACH_ISA
def test_strided_inputs(isa: str) -> None:
    codes, scale, table = random_weight(33, 203, 64, "int4")
    x, bias = activations(3, 203, torch.float32), torch.randn(33)
    how = ("ovp4", 32, "optimal", codebook("adaptive"), None)
    expected = reference.ovp_linear_quantized_reference(x, codes, scale, table, bias, 33, 64, *how)
    arguments = (strided(x), strided(codes), strided(scale), strided(table), strided(bias), 33, 64)
    strided_how = (*how[:3], strided(codebook("adaptive")), None)
    assert_same_bits(cpu.ovp_linear_quantized_cpu(*arguments, *strided_how, isa), expected)


@EACH_ISA
def test_no_rows(isa: str) -> None:
    codes, scale, table = random_weight(33, 203, 64, "int4")
    how = ("int8", -1, "optimal", None, None)
    out = cpu.ovp_linear_quantized_cpu(torch.empty(0, 203), codes, scale, table, None, 33, 64, *how, isa)
    assert out.shape == (0, 33)
    levels, scales = cpu.quantize_activations_cpu(
        torch.empty(2, 0, 203), "int8", 64, "optimal", None, None, torch.int8, isa
    )
    assert levels.shape == (2, 0, 203)
    assert scales.shape == (2, 0, 4)


@EACH_ISA
@pytest.mark.parametrize("pairing", ["optimal", "paper"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_eight_bits_are_searched_and_decoded_like_the_reference(
    group_size: int, pairing: str, isa: str
) -> None:
    grid = [0.75, 1.0, 1.5, 2.5, 4.0, 10.0, 40.0]
    for (rows, columns), dtype in itertools.product(((1, 1), (5, 203), (33, 64), (3, 2500)), DTYPES):
        weight = heavy_tailed(rows, columns).clone()
        weight[0, columns // 2] = 5.0
        weight[rows // 2, :] = 0.0 if rows > 4 else weight[rows // 2, :]
        weight = weight.to(dtype)
        found = cpu.ovp8_quantize_cpu(weight, group_size, pairing, grid, isa)
        expected = reference.ovp8_quantize_reference(weight, group_size, pairing, grid)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])
        decoded = cpu.ovp8_decode_cpu(*found, columns, group_size, dtype, isa)
        assert_same_bits(decoded, reference.ovp8_decode_reference(*expected, columns, group_size, dtype))


def eight_bit_weight(rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    weight = heavy_tailed(rows, columns, seed=3).clone()
    weight[:, columns // 2] *= 50
    return reference.ovp8_quantize_reference(weight, group_size, "optimal", [1.0, 2.0])


@EACH_ISA
def test_every_pair_of_bytes_decodes_like_the_reference(isa: str) -> None:
    low, high = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    codes = torch.stack((low, high), dim=-1).reshape(256, 512).to(torch.uint8)
    scale = static_scale(0.5)[None]
    found = cpu.ovp8_decode_cpu(codes, scale, 512, 0, torch.float32, isa)
    assert_same_bits(found + 0.0, reference.ovp8_decode_reference(codes, scale, 512, 0, torch.float32) + 0.0)


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUPS)
def test_eight_bit_linear_against_float64(group_size: int, isa: str) -> None:
    """A float32 product is off by half a unit, a sum of K by K / 2 units at most, in terms of |x| |w|^T."""
    for (rows, outputs, columns), dtype in itertools.product(
        ((1, 1, 1), (1, 33, 515), (3, 6, 70), (17, 18, 1300), (100, 5, 128)), DTYPES
    ):
        codes, scale = eight_bit_weight(outputs, columns, group_size)
        x = torch.randn(rows, columns).to(dtype)
        bias = torch.randn(outputs).to(dtype)
        out = cpu.ovp8_linear_cpu(x, codes, scale, bias, outputs, group_size, isa)
        weight = reference.ovp8_decode_reference(codes, scale, columns, group_size, torch.float32).double()
        exact = x.double() @ weight.T + bias.double()
        magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
        rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        bound = magnitude * (columns / 16 + 24) * 2**-24 + exact.abs() * rounding + 2**-24
        assert bool(((out.double() - exact).abs() <= bound).all())


def test_eight_bit_linear_gives_the_same_bits_on_every_instruction_set() -> None:
    from olive.ops.cpu import cpu_isas

    codes, scale = eight_bit_weight(21, 333, 64)
    x = torch.randn(9, 333)
    outs = [cpu.ovp8_linear_cpu(x, codes, scale, None, 21, 64, isa) for isa in cpu_isas()]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@EACH_ISA
def test_nan_stays_in_its_row(isa: str) -> None:
    codes, scale = eight_bit_weight(5, 70, 32)
    x = torch.randn(3, 70)
    x[1, 69] = float("nan")
    out = cpu.ovp8_linear_cpu(x, codes, scale, None, 5, 32, isa)
    assert torch.isnan(out).all(dim=1).tolist() == [False, True, False]


def test_levels_above_127_are_refused_with_the_way_out() -> None:
    codes, scale, table = random_weight(4, 64, 32, "flint4")
    x = torch.randn(2, 64)
    how = ("int8", -1, "optimal", None, None)
    for linear in (cpu.ovp_linear_quantized_cpu, reference.ovp_linear_quantized_reference):
        with pytest.raises(
            ValueError, match=r"codebook: expected levels up to 127 .* got 192; use codebook 'int4'"
        ):
            linear(x, codes, scale, table, None, 4, 32, *how)


def test_too_many_columns_for_an_int32_are_refused_with_the_bound() -> None:
    columns = 133_146
    codes = torch.zeros(1, columns // 2, dtype=torch.uint8)
    scale = static_scale(1.0)[None]
    arguments = (torch.zeros(1, columns), codes, scale, codebook("int4"), None, 1, -1)
    with pytest.raises(ValueError, match=r"in_features: expected at most 133144 columns .* got 133146"):
        cpu.ovp_linear_quantized_cpu(*arguments, "int8", -1, "optimal", None, None)
    in_groups = cpu.ovp_linear_quantized_cpu(*arguments, "int8", 128, "optimal", None, None)
    assert in_groups.tolist() == [[0.0]]


def test_not_finite_eight_bit_weight_is_refused() -> None:
    weight = torch.randn(3, 40)
    weight[2, 5] = float("nan")
    for group_size in (0, 32):
        with pytest.raises(ValueError, match="weight: expected finite values"):
            cpu.ovp8_quantize_cpu(weight, group_size, "optimal", [1.0])


def test_levels_that_no_int8_holds_are_refused() -> None:
    x = torch.randn(2, 64)
    for device in ("cpu", "meta"):
        with pytest.raises(TypeError, match="dtype: expected a float type for format 'ovp8'"):
            torch.ops.olive.quantize_activations(x.to(device), "ovp8", -1, "optimal", None, None, torch.int8)
    with pytest.raises(
        TypeError, match=r"dtype: expected int8, float32, bfloat16 or float16, got torch\.int32"
    ):
        torch.ops.olive.quantize_activations(x, "int8", -1, "optimal", None, None, torch.int32)
