"""`ovp_linear_quantized_triton` gives the reference's bits; with split columns, up to float32's rounding.

The reference runs on the CPU. Sums of integers are exact, and what follows is rounded in one order.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops.reference_quantized import ovp_linear_quantized_reference
from tests.kernels.conftest import INTERPRETING, in_turn
from tests.kernels.quantized_cases import INT8_BOOKS, activations, how
from tests.ops.cpu_cases import BOOKS, random_weight, strided
from tests.ops.fixed_point import assert_same_bits

# One row; few; the edges of a block of 16, 32, 64; past it.
ROWS = (1, 3, 16, 17, 33, 65)
# (N, K): one; odd; a ragged second block of rows; several blocks of columns, the last one ragged.
SHAPES = ((1, 1), (3, 5), (70, 131), (9, 200))
FORMATS = ("int8", "ovp4")


def _bias(size: int, turn: int) -> Tensor | None:
    kinds = (None, torch.float32, torch.float16, torch.bfloat16)
    kind = kinds[turn % 4]
    return None if kind is None else torch.linspace(-1, 2, size).to(kind)


def _linear(kernels: ModuleType, device: str, arguments: tuple[Any, ...]) -> Tensor:
    on_device = [part.to(device) if isinstance(part, Tensor) else part for part in arguments]
    return kernels.ovp_linear_quantized_triton(*on_device).cpu()


def _arguments(
    x: Tensor,
    outputs: int,
    group_size: int,
    x_group_size: int,
    bias: Tensor | None = None,
    format: str = "int8",
    book: str = "adaptive",
) -> tuple[Any, ...]:
    stored = random_weight(outputs, x.shape[-1], group_size, book)
    return (x, *stored, bias, outputs, group_size, *how(format, x_group_size, "optimal", book))


def _check(kernels: ModuleType, device: str, arguments: tuple[Any, ...]) -> None:
    assert_same_bits(_linear(kernels, device, arguments), ovp_linear_quantized_reference(*arguments))


@pytest.mark.parametrize("x_group_size", GROUP_SIZES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_output_has_the_bits_of_the_reference(
    kernels: ModuleType, device: str, group_size: int, x_group_size: int
) -> None:
    groups = GROUP_SIZES.index(group_size) + 2 * GROUP_SIZES.index(x_group_size)
    sizes = [*product(ROWS, range(len(SHAPES)))]
    for rows, turn in sizes[groups % 12 :: 12] if INTERPRETING else sizes:
        outputs, columns = SHAPES[turn]
        # The interpreter cuts bits off where it should round to bfloat16, and takes long to search scales.
        dtype = (torch.float16, torch.float32, torch.bfloat16)[(turn + rows) % (2 if INTERPRETING else 3)]
        format = FORMATS[rows < 4 and groups % 3 == 0]
        x = activations(rows, columns, dtype)
        book = INT8_BOOKS[(turn + rows) % len(INT8_BOOKS)]
        bias = _bias(outputs, turn + groups)
        _check(kernels, device, _arguments(x, outputs, group_size, x_group_size, bias, format, book))


@pytest.mark.parametrize("groups", [(-1, -1), (0, 0), (128, -1), (-1, 64), (32, 64)], ids=str)
def test_a_weight_decoded_first_gives_the_same_bits(
    kernels: ModuleType, device: str, groups: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with many rows; here with few, to save time."""
    from olive.kernels import ovp_linear_quantized

    monkeypatch.setattr(ovp_linear_quantized, "DECODE_FROM_ROWS", 1)
    for rows, outputs, columns in ((3, 9, 75), (70, 130, 131)):
        assert ovp_linear_quantized.plan_linear_quantized(rows, outputs, columns, *groups, 0).decoded
        x = activations(rows, columns, torch.float16)
        _check(kernels, device, _arguments(x, outputs, *groups, _bias(outputs, 1)))


@pytest.mark.parametrize("groups", [(-1, -1), (0, 0)], ids=str)
def test_columns_split_over_programs_share_an_exact_sum(
    kernels: ModuleType, device: str, groups: tuple[int, int], dtype: torch.dtype
) -> None:
    from olive.kernels.ovp_linear_quantized import plan_linear_quantized

    assert plan_linear_quantized(5, 30, 1600, *groups, 0).tile.splits > 1
    for turn in in_turn(range(4), groups[0]):
        x = activations(5, 1600, dtype)
        _check(kernels, device, _arguments(x, 30, *groups, _bias(30, turn)))


@pytest.mark.parametrize("groups", [(128, -1), (0, 64), (64, 128)], ids=str)
def test_split_columns_with_groups_are_within_rounding_and_repeat(
    kernels: ModuleType, device: str, groups: tuple[int, int]
) -> None:
    """One rounding per group and split, each of at most 2^-24 of the terms' sum."""
    from olive.kernels.ovp_linear_quantized import plan_linear_quantized

    plan = plan_linear_quantized(3, 30, 1100, *groups, 0)
    assert plan.tile.splits > 1
    x = torch.randn(3, 1100)
    arguments = _arguments(x, 30, *groups)
    found = _linear(kernels, device, arguments)
    expected = ovp_linear_quantized_reference(*arguments)
    magnitudes = list(arguments)
    magnitudes[0] = x.abs()
    terms = ovp_linear_quantized_reference(*magnitudes[:1], *_positive(arguments[1:4]), *arguments[4:])
    blocks = -(-1100 // plan.tile.block_k)
    assert bool(((found - expected).abs() <= 2 * (blocks + 9) * 2.0**-24 * terms).all())
    assert torch.equal(_linear(kernels, device, arguments), found)


def _positive(stored: tuple[Tensor, ...]) -> list[Tensor]:
    """A weight whose sums are at least those of another one's magnitudes: level 127 and positive scales."""
    codes, scale, codebook = stored
    plain = scale & 0x7FFF | 1
    return [torch.full_like(codes, 0xFF), plain, codebook]


def test_integers_past_float32_are_rounded_once(kernels: ModuleType, device: str) -> None:
    """A sum of 2001 products of nearly 127 x 127 needs 25 bits; rounding parts of it would show."""
    columns = 2001
    codes = torch.full((3, 1001), 0xFF, dtype=torch.uint8)  # P[15] = 127
    codes[1, ::7], codes[2, ::3] = 0xEF, 0xFD
    scale = torch.full((3, 1), 0x3F81, dtype=torch.int16)  # 1, the plain rule
    x = torch.full((2, columns), 127.0)
    x[1, ::5] = 126.0
    table = BOOKS["adaptive"].tensor()
    for split in (1, 2):  # 17 rows are not split here
        rows = x.repeat(9, 1)[: 2 if split == 2 else 17]
        _check(kernels, device, (rows, codes, scale, table, None, 3, -1, *how("int8", -1)))


def test_rows_that_are_not_finite_become_nan_and_touch_no_other(kernels: ModuleType, device: str) -> None:
    for groups in ((-1, -1), (64, 32), (-1, 0)):
        x = torch.randn(4, 300)
        clean = _linear(kernels, device, _arguments(x, 20, *groups))
        x[0, 7], x[3, 299] = float("nan"), float("inf")
        found = _linear(kernels, device, _arguments(x, 20, *groups))
        assert bool(found[0].isnan().all())
        assert bool(found[3].isnan().all())
        assert torch.equal(found[1:3], clean[1:3])


def test_any_leading_shape_and_strides(kernels: ModuleType, device: str) -> None:
    bias = strided(torch.linspace(-1, 1, 6))
    for shape in ((45,), (2, 3, 45), (0, 45), (2, 0, 45)):
        x, *stored = _arguments(strided(torch.randn(shape)), 6, 32, -1)[:4]
        spread = [strided(tensor) for tensor in stored]
        _check(kernels, device, (x, *spread, bias, 6, 32, *how("int8", -1)))
    _check(kernels, device, _arguments(torch.randn(45, 4).t(), 6, 32, 32))


def test_plans_cover_every_column_within_one_group(kernels: ModuleType, device: str) -> None:
    from olive.formats.activations import integer_block
    from olive.kernels.ovp_linear import MAX_SPLITS
    from olive.kernels.ovp_linear_quantized import plan_linear_quantized

    for capability in (0, 80, 90):
        for rows in (1, 16, 17, 64, 65, 300, 5000):
            for outputs in (1, 64, 4096, 152064):
                for columns in (1, 127, 4096, 14336):
                    for groups in ((-1, -1), (0, 32), (64, -1), (32, 128), (128, 128)):
                        plan = plan_linear_quantized(rows, outputs, columns, *groups, capability).tile
                        width = plan.block_k * plan.blocks_per_split(columns)
                        assert max(groups) <= 0 or integer_block(columns, *groups) % plan.block_k == 0
                        assert plan.block_k >= 32
                        assert 1 <= plan.splits <= MAX_SPLITS
                        assert width * (plan.splits - 1) < columns <= width * plan.splits


def test_many_rows_equal_the_reference(kernels: ModuleType, device: str) -> None:
    """Every plan at the size that it is for; too slow to interpret."""
    if device == "cpu":
        pytest.skip("too slow under the interpreter")
    from olive.kernels.launch import capability_of
    from olive.kernels.ovp_linear_quantized import plan_linear_quantized

    capability = capability_of(torch.device(device, torch.cuda.current_device()))
    for rows in (40, 200, 256, 1000):
        for groups in ((-1, -1), (128, -1), (-1, 64), (128, 128), (32, 32)):
            x = activations(rows, 1111, torch.bfloat16)
            arguments = _arguments(x, 5000, *groups, _bias(5000, 1))
            tile = plan_linear_quantized(rows, 5000, 1111, *groups, capability).tile
            if tile.splits == 1 or max(groups) < 0:
                _check(kernels, device, arguments)
                continue
            # Programs that share columns add float32 sums in an order of their own.
            got, wanted = _linear(kernels, device, arguments), ovp_linear_quantized_reference(*arguments)
            limit = 2.0**-8 * wanted.abs() + 2.0**-20 * wanted.abs().amax(1, keepdim=True)
            assert bool(((got.double() - wanted.double()).abs() <= limit).all())


def test_a_cuda_graph_replays_the_product(kernels: ModuleType, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    for rows, groups in ((1, (128, -1)), (5, (-1, -1)), (300, (-1, -1)), (5, (128, 64))):
        x = torch.randn(rows, 1600).half()
        arguments = [
            part.to(device) if isinstance(part, Tensor) else part for part in _arguments(x, 70, *groups)
        ]
        expected = kernels.ovp_linear_quantized_triton(*arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        static = torch.zeros_like(arguments[0])
        with torch.cuda.graph(graph):
            out = kernels.ovp_linear_quantized_triton(static, *arguments[1:])
        static.copy_(arguments[0])
        graph.replay()
        assert torch.equal(out, expected)
