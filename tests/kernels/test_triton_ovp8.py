"""Weights of eight bits: quantizing and decoding bit for bit the reference, products against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, PAIRINGS, codes_shape, scale_shape
from olive.formats.activations import DYNAMIC_OVP8_GRID
from olive.ops.reference_quantized import ovp8_decode_reference, ovp8_quantize_reference
from tests.kernels.conftest import in_turn
from tests.kernels.test_triton_linear import check_product
from tests.ops.cpu_cases import heavy_tailed, strided

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRID = list(DYNAMIC_OVP8_GRID)
QUANTIZED = ((2, 141), (1, 1), (3, 75))
DECODED = ((1, 1), (2, 2), (5, 7), (3, 130), (9, 715))
ROWS = (1, 2, 17, 33, 65)
PRODUCTS = ((1, 1), (3, 5), (70, 131), (65, 300), (9, 1100))


def _stored(rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes with every byte, a fifth of the pairs outliers and some invalid, and scales around 1/1000."""
    codes = torch.randint(256, codes_shape(rows, columns, bits=8), dtype=torch.uint8)
    odd = codes[:, 1::2]
    codes[:, 1::2] = torch.where(torch.rand(odd.shape) < 0.2, 0x80, odd)
    values = 1e-3 * torch.exp2(8 * torch.rand(scale_shape(rows, columns, group_size)) - 4)
    return codes, (values.view(torch.int32) >> 16).short() & ~1


def _quantize(
    kernels: ModuleType, device: str, weight: Tensor, group_size: int, pairing: str, grid: list[float] = GRID
) -> None:
    codes, scale = ovp8_quantize_reference(weight, group_size, pairing, grid)
    found_codes, found_scale = kernels.ovp8_quantize_triton(weight.to(device), group_size, pairing, grid)
    assert torch.equal(found_scale.cpu(), scale)
    assert torch.equal(found_codes.cpu(), codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", QUANTIZED, ids=str)
def test_search_equals_the_reference(
    kernels: ModuleType, device: str, shape: tuple[int, int], group_size: int
) -> None:
    turn = QUANTIZED.index(shape) + GROUP_SIZES.index(group_size)
    for pairing in in_turn(PAIRINGS, turn):
        weight = heavy_tailed(*shape).clone()
        weight[0, shape[1] // 2] *= 500
        _quantize(kernels, device, weight.to(FLOATS[turn % 3]), group_size, pairing)


def test_rows_longer_than_a_chunk_are_searched_alike(kernels: ModuleType, device: str) -> None:
    for group_size in (-1, 0):
        _quantize(kernels, device, heavy_tailed(1, 1024 + 37), group_size, "optimal", [1.0, 3.0])


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_unusual_values_decide_alike(kernels: ModuleType, device: str, group_size: int) -> None:
    columns = 40
    tail = heavy_tailed(1, columns)
    border = torch.full((1, columns), 2.0**-61)
    border[0, 0] = 2.0**-60
    outlier = tail.clone()
    outlier[0, 20] = 800.0
    rows = [torch.zeros(1, columns), border, border * (1 - 2.0**-20), outlier, tail * 1e-30, tail * 1e38]
    for weight in rows[:4] if group_size == 0 else [torch.cat(rows)]:
        _quantize(kernels, device, weight, group_size, "optimal", [0.5, 8.0])


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_a_value_that_is_not_finite_is_rejected(kernels: ModuleType, device: str, group_size: int) -> None:
    weight = heavy_tailed(2, 45).clone()
    weight[1, 44] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        kernels.ovp8_quantize_triton(weight.to(device), group_size, "optimal", [1.0])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", DECODED, ids=str)
def test_values_equal_the_reference(
    kernels: ModuleType, device: str, shape: tuple[int, int], group_size: int, dtype: torch.dtype
) -> None:
    stored = _stored(*shape, group_size)
    expected = ovp8_decode_reference(*stored, shape[1], group_size, dtype)
    found = kernels.ovp8_decode_triton(*(part.to(device) for part in stored), shape[1], group_size, dtype)
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), expected)


def test_every_pair_decodes(kernels: ModuleType, device: str) -> None:
    """The invalid ones too, and in bfloat16, whose values the interpreter need not round here."""
    byte = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack(torch.meshgrid(byte, byte, indexing="ij"), -1).reshape(256, 512)
    scale = torch.full((256, 1), 0x3F80, dtype=torch.int16)
    for dtype in in_turn(FLOATS, 1):
        expected = ovp8_decode_reference(codes, scale, 512, -1, dtype)
        found = kernels.ovp8_decode_triton(codes.to(device), scale.to(device), 512, -1, dtype)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_output_is_within_the_rounding_of_float32(
    kernels: ModuleType, device: str, rows: int, dtype: torch.dtype
) -> None:
    for turn, (outputs, columns) in enumerate(PRODUCTS, ROWS.index(rows)):
        for group_size in in_turn(GROUP_SIZES, turn):
            codes, scale = _stored(outputs, columns, group_size)
            weight = ovp8_decode_reference(codes, scale, columns, group_size, torch.float32)
            x = torch.randn(rows, columns).to(dtype)
            bias = torch.linspace(-1, 2, outputs) if turn % 2 else None
            arguments = [None if part is None else part.to(device) for part in (x, codes, scale, bias)]
            found = kernels.ovp8_linear_triton(*arguments, outputs, group_size).cpu()
            check_product(found, x, weight, bias)


def test_unit_vectors_give_the_weight_rounded_once(
    kernels: ModuleType, device: str, dtype: torch.dtype
) -> None:
    """Scale times level is exact in float32, so nothing is rounded before the output is."""
    columns = 133
    for group_size in GROUP_SIZES:
        codes, scale = _stored(5, columns, group_size)
        weight = ovp8_decode_reference(codes, scale, columns, group_size, dtype)
        units = torch.eye(columns)[[0, 1, 2, 63, 64, 131, 132]].to(dtype)
        stored = (codes.to(device), scale.to(device), None, 5, group_size)
        found = kernels.ovp8_linear_triton(units.to(device), *stored).cpu()
        assert torch.equal(found, (units.float() @ weight.float().t()).to(dtype))
        single = kernels.ovp8_linear_triton(units[-1].to(device), *stored).cpu()
        assert torch.equal(single, weight[:, -1])


def test_inputs_need_not_be_contiguous_or_aligned(kernels: ModuleType, device: str) -> None:
    codes, scale = _stored(6, 45, 32)
    weight = ovp8_decode_reference(codes, scale, 45, 32, torch.float32)
    x = torch.randn(2, 3, 45)
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view(codes.shape)
    shifted.copy_(codes)
    for view in (strided(codes).to(device), shifted):
        found = kernels.ovp8_decode_triton(view, strided(scale).to(device), 45, 32, torch.float32)
        assert torch.equal(found.cpu(), weight)
        found = kernels.ovp8_linear_triton(strided(x).to(device), view, scale.to(device), None, 6, 32)
        check_product(found.cpu(), x, weight, None)
    quantized = kernels.ovp8_quantize_triton(strided(weight).to(device), 32, "optimal", [2.0])
    expected = ovp8_quantize_reference(weight, 32, "optimal", [2.0])
    assert torch.equal(quantized[0].cpu(), expected[0])
    assert torch.equal(quantized[1].cpu(), expected[1])
    assert (
        kernels.ovp8_linear_triton(x[:, :0].to(device), shifted, scale.to(device), None, 6, 32).numel() == 0
    )
