"""`quantize_activations` on the CUDA kernels: the reference's levels and scales, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, pack_scale
from olive.formats.activations import ACTIVATION_FORMATS
from olive.ops import reference_quantized
from olive.ops.cuda_quantized import _quantize, quantize_activations_cuda
from tests.cuda.module import (
    EACH_TARGET,
    NEEDS_COMPILER,
    SCHEDULES,
    Target,
    cuda_on_cpu,
    emulated_cuda,
    poison,
)
from tests.ops.cpu_cases import BOOKS, DTYPES, heavy_tailed, strided
from tests.ops.fixed_point import assert_same_bits
from tests.ops.test_cpu_encode import VALUES

PAIRINGS = ("optimal", "paper")
# One value; a pair; an odd K; ragged groups; past a chunk of 1024 columns; more chunks than one.
SHAPES = ((1, 1), (3, 2), (5, 7), (4, 130), (3, 256), (2, 1100), (2, 3000))
LEVEL_TYPES = (torch.int8, *DTYPES)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def _static(group_size: int, value: float = 0.003) -> Tensor | None:
    if group_size != 0:
        return None
    return pack_scale(torch.tensor([value]), torch.tensor([False]))


def _arguments(format: str, group_size: int, pairing: str, book: str) -> tuple[Any, ...]:
    table = BOOKS[book].tensor() if format == "ovp4" else None
    return format, group_size, pairing, table, _static(group_size)


def _check(target: Target, x: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    expected = reference_quantized.quantize_activations_reference(x, *arguments, dtype)
    moved = [value.to(target.device) if isinstance(value, Tensor) else value for value in arguments]
    found = quantize_activations_cuda(x.to(target.device), *moved, dtype)
    for name, got, wanted in zip(("levels", "scale"), found, expected, strict=True):
        assert got.shape == wanted.shape, name
        assert got.dtype == wanted.dtype, name
        if got.dtype == torch.int8:
            assert torch.equal(got.cpu(), wanted), name
        else:
            assert_same_bits(got.cpu(), wanted)


def _level_type(format: str, book: str, turn: int) -> torch.dtype:
    holds_int8 = format == "int8" or (format == "ovp4" and book != "flint4")
    return LEVEL_TYPES[turn % 4] if holds_int8 else DTYPES[turn % 3]


@EACH_TARGET
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_levels_and_scales_are_the_references(format: str, group_size: int, target: Target) -> None:
    start = GROUP_SIZES.index(group_size) + ACTIVATION_FORMATS.index(format)
    for turn, shape in enumerate(SHAPES, start=start):
        book = list(BOOKS)[turn % len(BOOKS)]
        x = (50 * heavy_tailed(*shape)).to(DTYPES[turn % 3])
        arguments = _arguments(format, group_size, PAIRINGS[turn // 2 % 2], book)
        with target.kernels(schedule=SCHEDULES[turn % 3]) as ran:
            _check(target, x, arguments, _level_type(format, book, turn))
        assert ran is None or len(ran) == 1, "one launch"


@EACH_TARGET
@pytest.mark.parametrize("group_size", [-1, 0, 64])
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_every_type_of_values_and_levels(format: str, group_size: int, target: Target) -> None:
    with target.kernels(schedule=7):
        for dtype in DTYPES:
            x = (10 * heavy_tailed(3, 90)).to(dtype)
            for level_type in LEVEL_TYPES[format == "ovp8" :]:
                _check(target, x, _arguments(format, group_size, "optimal", "adaptive"), level_type)


@EACH_TARGET
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("book", BOOKS)
def test_every_codebook_and_pairing(book: str, pairing: str, target: Target) -> None:
    x = heavy_tailed(4, 200)
    with target.kernels():
        for group_size in (-1, 32, 0):
            _check(target, x, _arguments("ovp4", group_size, pairing, book), torch.float32)


@EACH_TARGET
@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("values", VALUES)
def test_unusual_values(values: str, group_size: int, target: Target) -> None:
    """Zeros, all alike, values on thresholds, outliers, the ends of float32, groups about 2^-60."""
    dtype = torch.float16 if values == "large" else torch.bfloat16 if values == "ties" else torch.float32
    with target.kernels():
        for format in ACTIVATION_FORMATS:
            for pairing in PAIRINGS:
                x = VALUES[values](4, 75).to(dtype)
                _check(target, x, _arguments(format, group_size, pairing, "adaptive"), torch.float32)


@EACH_TARGET
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_values_that_are_not_finite_empty_their_group(format: str, group_size: int, target: Target) -> None:
    x = heavy_tailed(6, 1100).clone()
    x[1, 0], x[2, 1099], x[4, 700] = torch.nan, torch.inf, -torch.inf
    with target.kernels(schedule=1):
        _check(target, x, _arguments(format, group_size, "optimal", "nf4"), torch.float32)


@EACH_TARGET
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_around_every_threshold(format: str, target: Target) -> None:
    """Multiples of 1/2 and their neighbours in float32 with a scale of 1, beside values of every kind."""
    powers = 2.0 ** torch.arange(8, 16)
    half = torch.cat((torch.arange(-520, 521) / 2, powers, 1.5 * powers))
    around = torch.cat((half, half.nextafter(half - 1), half.nextafter(half + 1)))
    pairs = torch.cartesian_prod(around, torch.tensor([0.0, -0.0, 20.0, -300.0, 40000.0]))
    values = torch.cat((pairs, pairs.flip(1))).flatten()
    x = torch.cat((values, values.new_zeros(-len(values) % 512))).view(-1, 512)
    with target.kernels(multiprocessors=2):
        for pairing in PAIRINGS:
            table = BOOKS["adaptive"].tensor() if format == "ovp4" else None
            _check(target, x, (format, 0, pairing, table, _static(0, 1.0)), torch.float32)


@EACH_TARGET
@pytest.mark.parametrize("format", ACTIVATION_FORMATS)
def test_rows_longer_than_a_block_holds(format: str, target: Target) -> None:
    """32768 columns and more; many rows for few multiprocessors, which then do not share candidates."""
    for rows, columns in ((1, 32768), (1, 33001)) if format == "int8" else ((1, 34000),):
        x = heavy_tailed(rows, columns).bfloat16()
        with target.kernels(multiprocessors=1):
            _check(target, x, _arguments(format, -1, "optimal", "int4"), torch.float32)
    with target.kernels(multiprocessors=1):
        _check(target, heavy_tailed(40, 70), _arguments(format, -1, "optimal", "int4"), torch.float32)
        _check(target, heavy_tailed(40, 270), _arguments(format, 128, "optimal", "int4"), torch.float32)


@NEEDS_COMPILER
@pytest.mark.parametrize("group_size", [-1, 0, 32, 64, 128])
@pytest.mark.parametrize("format", ["int8", "ovp4"])
def test_levels_for_products_are_permuted_and_padded(format: str, group_size: int) -> None:
    """Columns 2 j, 2 j + 1, 8 + 2 j, 8 + 2 j + 1 of sixteen stand at 4 j .. 4 j + 3; scales [G, rows]."""
    for columns in (1, 33, 64, 200):
        x = heavy_tailed(3, columns).half()
        arguments = _arguments(format, group_size, "optimal", "adaptive")
        levels, scale = reference_quantized.quantize_activations_reference(x, *arguments, torch.int8)
        width = -(-columns // 64) * 64
        padded = torch.nn.functional.pad(levels, (0, width - columns)).view(3, -1, 2, 4, 2)
        got = torch.full((3, width), 85, dtype=torch.int8)
        got_scale = torch.full((scale.shape[1], 7), torch.nan)
        with cuda_on_cpu():
            _quantize(x, *arguments, got, got_scale, for_products=True)
        assert torch.equal(got, padded.transpose(2, 3).reshape(3, width))
        assert torch.equal(got_scale[:, :3], scale.T)
        assert bool(got_scale[:, 3:].isnan().all())


@NEEDS_COMPILER
def test_strided_empty_and_many_dimensional_inputs() -> None:
    x = heavy_tailed(6, 50).view(2, 3, 50)
    arguments = _arguments("int8", 32, "optimal", "int4")
    with cuda_on_cpu():
        _check(Target("cpu"), strided(x), arguments, torch.int8)
        _check(Target("cpu"), x[:, :0], arguments, torch.int8)
        _check(Target("cpu"), x[0, 0], arguments, torch.int8)


@NEEDS_COMPILER
def test_bad_arguments_are_named() -> None:
    x = torch.zeros(4, 64)
    at = x.data_ptr()
    good = [at, 0, 4, 64, 0, -1, False, 0, 0, [], [], False, at, 3, at, 1, 0]
    module = emulated_cuda()

    def bad(index: int, value: object) -> None:
        module.quantize_activations(*good[:index], value, *good[index + 1 :])

    with pytest.raises(ValueError, match="x: expected an address aligned to 8 bytes"):
        bad(0, at + 4)
    with pytest.raises(ValueError, match="m: expected at least 1, got 0"):
        bad(2, 0)
    with pytest.raises(ValueError, match=r"format: expected 0 \(int8\), 1 \(ovp4\) or 2 \(ovp8\)"):
        bad(4, 3)
    with pytest.raises(ValueError, match="codebook: expected an address, got 0"):
        bad(4, 1)
    with pytest.raises(ValueError, match="group_size: expected -1, 0, 32, 64 or 128, got 16"):
        bad(5, 16)
    with pytest.raises(ValueError, match="static_scale: expected an address, got 0"):
        bad(5, 0)
    with pytest.raises(ValueError, match="pair_grid: expected at most 8 multiples, got 9"):
        bad(9, [1.0] * 9)
    with pytest.raises(ValueError, match="for_products: expected int8 levels and a pitch of scales"):
        bad(11, True)
    with pytest.raises(ValueError, match="level_type: expected 0 to 3"):
        bad(13, 4)
    with (
        cuda_on_cpu(shared_per_block=16 * 1024),
        pytest.raises(ValueError, match="k: expected rows whose sums fit"),
    ):
        arguments = _arguments("ovp4", -1, "optimal", "int4")
        quantize_activations_cuda(torch.zeros(1, 1024 * 1024), *arguments, torch.int8)
    with cuda_on_cpu(), pytest.raises(TypeError, match="dtype: expected a float type for format 'ovp8'"):
        quantize_activations_cuda(x, "ovp8", -1, "optimal", None, None, torch.int8)
