"""`ovp_linear` on the CPU kernels, on every instruction set: the fixed-point oracle's bits, and its error.

Two questions, apart: do the kernels compute what is defined (bit for bit), and is what is defined close to
the exact product (against float64).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops import cpu, reference
from tests.ops.cpu_cases import (
    BOOKS,
    DTYPES,
    EACH_ISA,
    ISAS,
    NEEDS_KERNELS,
    heavy_tailed,
    random_weight,
    strided,
)
from tests.ops.fixed_point import (
    assert_same_bits,
    fused_multiply_add,
    ovp_linear_fixed_point,
    scale_values,
    weight_levels,
)

pytestmark = NEEDS_KERNELS
Weight = tuple[Tensor, Tensor, Tensor]  # codes, scale, codebook
# Rows one by one, in threes to sixes, a tile of 16, one more, and past the 128 that share a decoded block.
ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 17, 130)
# (N, K): one; odd tails below a lane; one row block; a ragged second panel; several blocks, the last ragged.
SHAPES = ((1, 1), (3, 5), (16, 128), (33, 67), (47, 300))


def _activations(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "outlier":
        x[:, columns // 2] = 80.0  # as strong as the strongest of a real encoder
    elif kind == "tails":
        x *= torch.exp(2 * torch.randn(columns, generator=generator))
    elif kind == "tiny":
        x *= 1e-6 if dtype == torch.float16 else 1e-30
    elif kind == "huge":
        x *= 1e3 if dtype == torch.float16 else 1e30
    elif kind == "zeros":
        x[0] = 0.0
        x[:, : columns // 2] = 0.0
    elif kind == "vanishing":  # around 2^-105, below which a block is zero
        x = torch.exp2(-105 + torch.randint(-3, 3, (rows, columns), generator=generator).float())
    elif kind == "mixed":  # rows on very different scales
        x *= torch.logspace(-20, 20, rows)[:, None] if dtype != torch.float16 else 1.0
    return x.to(dtype)


KINDS = ("normal", "outlier", "tails", "tiny", "huge", "zeros", "vanishing", "mixed")


@cache
def _expected(
    rows: int, shape: tuple[int, int], group_size: int, book: str, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input, bias and the oracle's output, computed once for all instruction sets."""
    x = _activations(kind, rows, shape[1], dtype)
    turn = rows + shape[0] + GROUP_SIZES.index(group_size)
    bias = None if turn % 3 == 0 else torch.linspace(-1, 2, shape[0]).to(DTYPES[turn % 3])
    codes, scale, table = random_weight(*shape, group_size, book)
    return x, bias, ovp_linear_fixed_point(x, codes, scale, table, bias, group_size)


def _run(isa: str, x: Tensor, weight: Weight, bias: Tensor | None, group: int) -> Tensor:
    codes, scale, table = weight
    return cpu.ovp_linear_cpu(x, codes, scale, table, bias, codes.shape[0], group, isa)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_output_equals_the_fixed_point_oracle(rows: int, dtype: torch.dtype, isa: str) -> None:
    for shape in SHAPES:
        for group_size in GROUP_SIZES:
            turn = rows + shape[0] + GROUP_SIZES.index(group_size)
            book = list(BOOKS)[turn % len(BOOKS)]
            x, bias, expected = _expected(rows, shape, group_size, book, dtype, "normal")
            found = _run(isa, x, random_weight(*shape, group_size, book), bias, group_size)
            assert_same_bits(found, expected)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("book", BOOKS)
def test_every_kind_of_input_equals_the_fixed_point_oracle(
    book: str, kind: str, dtype: torch.dtype, isa: str
) -> None:
    for rows, group_size in ((2, -1), (5, 32), (19, 128)):
        x, bias, expected = _expected(rows, (37, 259), group_size, book, dtype, kind)
        assert_same_bits(_run(isa, x, random_weight(37, 259, group_size, book), bias, group_size), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    columns=st.integers(1, 400),
    group_size=st.sampled_from(GROUP_SIZES),
    book=st.sampled_from(sorted(BOOKS)),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from((None, *DTYPES)),
    kind=st.sampled_from(KINDS),
)
def test_any_shape_equals_the_fixed_point_oracle(
    rows: int,
    outputs: int,
    columns: int,
    group_size: int,
    book: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    kind: str,
) -> None:
    x = _activations(kind, rows, columns, dtype)
    bias = None if bias_dtype is None else torch.randn(outputs).to(bias_dtype)
    weight = random_weight(outputs, columns, group_size, book)
    expected = ovp_linear_fixed_point(x, *weight, bias, group_size)
    for isa in ISAS:
        assert_same_bits(_run(isa, x, weight, bias, group_size), expected)


@EACH_ISA
def test_many_blocks_and_row_blocks_equal_the_oracle(isa: str) -> None:
    """More panels than threads, and K beyond what one prefetch covers."""
    weight = random_weight(200, 2100, 64, "adaptive")
    for dtype in DTYPES:
        for rows in (1, 9):
            x = _activations("tails", rows, 2100, dtype)
            expected = ovp_linear_fixed_point(x, *weight, None, 64)
            assert_same_bits(_run(isa, x, weight, None, 64), expected)


def test_the_emulated_fused_multiply_add_rounds_once() -> None:
    """Sums that lie on, just above and just below the middle of two float32 values."""
    one = torch.tensor(1.0)
    half_step = 2.0**-24
    for a, b, c, expected in (
        (half_step, 1.0, 1.0, 1.0),  # the middle, to even
        (half_step, 1 + 2.0**-23, 1.0, 1 + 2.0**-23),
        (half_step * (1 + 2.0**-23), 1 - 2.0**-24, 1.0, 1 + 2.0**-23),
        (half_step * (1 - 2.0**-24), 1.0, 1.0, 1.0),
        (2.0**-24 + 2.0**-47, 2.0**0, 1.0, 1 + 2.0**-23),
        (-(2.0**-60), 1.0, 1 + 2.0**-23, 1 + 2.0**-23),
        (2.0**-40, 2.0**-40, half_step, half_step),
        (3.0, 2.0**127, 1.0, torch.inf),
        (2.0**-100, 2.0**-49, 0.0, 2.0**-149),
    ):
        result = fused_multiply_add(torch.tensor(a), torch.tensor(b), torch.tensor(c))
        assert result.dtype == torch.float32
        assert result.item() == expected, (a, b, c)
    # 1 + 2^-24 + 2^-70: float64 alone loses the last term and rounds the tie down.
    x = torch.tensor(1 + 2.0**-12)
    y = torch.tensor(2.0**-24 * (1 - 2.0**-12 + 2.0**-24))  # x * y = 2^-24 (1 + 2^-36)
    assert fused_multiply_add(x, y, one).item() == 1 + 2.0**-23


# ---- the error, against float64 ---------------------------------------------------------------------------


def _exact(x: Tensor, weight: Weight, bias: Tensor | None, group: int) -> Tensor:
    codes, scale, table = weight
    decoded = reference.ovp_decode_reference(codes, scale, table, x.shape[-1], group, torch.float32)
    out = x.double() @ decoded.double().T
    return out if bias is None else out + bias.double()


def _torch_linear(x: Tensor, weight: Weight, bias: Tensor | None, group: int) -> Tensor:
    """Torch's linear in x's dtype, with the weight and the bias rounded to it."""
    codes, scale, table = weight
    decoded = reference.ovp_decode_reference(codes, scale, table, x.shape[-1], group, x.dtype)
    return torch.nn.functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))


# How many times the error of torch's linear in the same dtype: a row's largest, and its root mean square.
# A block keeps 15 bits of its largest value (float32: 23). For the 8 bits of a bfloat16 that is enough even
# beside outliers, for the 11 of a float16 without them. Else torch, which keeps the bits of every value, is
# closer. Those figures are calibrated: the shapes below, three codebooks, 2070 rows per line gave at most
# 14.7 and 4.6 for float16, 46 and 23 for float32. The a-priori bound further down holds for all of them.
TIMES_TORCH = {
    (torch.bfloat16, "normal"): (2.0, 2.0),
    (torch.bfloat16, "outlier"): (2.0, 2.0),
    (torch.bfloat16, "tails"): (2.0, 2.0),
    (torch.bfloat16, "tiny"): (2.0, 2.0),
    (torch.bfloat16, "huge"): (2.0, 2.0),
    (torch.float16, "normal"): (2.0, 2.0),
    (torch.float16, "tiny"): (2.0, 2.0),
    (torch.float16, "huge"): (2.0, 2.0),
    (torch.float16, "outlier"): (20.0, 6.0),
    (torch.float16, "tails"): (20.0, 6.0),
    (torch.float32, "normal"): (20.0, 10.0),
    (torch.float32, "tiny"): (20.0, 10.0),
    (torch.float32, "huge"): (20.0, 10.0),
    (torch.float32, "outlier"): (60.0, 30.0),
    (torch.float32, "tails"): (60.0, 30.0),
}
ERROR_SHAPES = ((65, 31), (77, 333), (64, 128), (97, 1023), (50, 512))


@cache
def _encoded(rows: int, columns: int, group_size: int, book: str) -> Weight:
    """A weight as quantization makes it."""
    table = BOOKS[book].tensor()
    grids = ([0.5, 0.75, 1.0], [0.6, 0.9])
    found = cpu.ovp_quantize_cpu(heavy_tailed(rows, columns), table, group_size, "optimal", *grids, None)
    return (*found, table)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "kind"), TIMES_TORCH, ids=str)
def test_error_is_at_most_a_small_multiple_of_torchs(dtype: torch.dtype, kind: str, rows: int) -> None:
    most, mean = TIMES_TORCH[dtype, kind]
    turn = ROWS.index(rows)
    (outputs, columns), group_size = ERROR_SHAPES[turn % 5], GROUP_SIZES[turn * 2 % 5]
    # One shape per number of rows, because torch's first product of each takes a tenth of a second.
    bias_dtype = (None, dtype, torch.float32)[turn % 3]
    for book in ("int4", "adaptive", "flint4"):
        weight = _encoded(outputs, columns, group_size, book)
        x = _activations(kind, rows, columns, dtype)
        bias = None if bias_dtype is None else torch.randn(outputs).to(bias_dtype)
        exact = _exact(x, weight, bias, group_size)
        error = (_run("", x, weight, bias, group_size).double() - exact).abs()
        allowed = (_torch_linear(x, weight, bias, group_size).double() - exact).abs()
        # Torch's error of one output may be nought by luck: every output is held to the largest of its row.
        # Rounding the exact value to the output's dtype is free.
        rounding = (exact.to(dtype).double() - exact).abs()
        assert bool((error <= torch.maximum(most * allowed.amax(dim=1, keepdim=True), rounding)).all())
        assert bool((error.norm(dim=1) <= mean * torch.maximum(allowed, rounding).norm(dim=1)).all())


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vanishing"])
def test_error_of_every_output_is_within_the_a_priori_bound(kind: str, dtype: torch.dtype, isa: str) -> None:
    """Half a unit per activation, one float32 rounding per step, one rounding of the output."""
    wide = dtype == torch.float32
    step, least = 2.0**-24, 2.0**-149
    for (outputs, columns), group_size in zip(ERROR_SHAPES, GROUP_SIZES, strict=True):
        weight = random_weight(outputs, columns, group_size, "adaptive")
        codes, scale, table = weight
        for rows in (1, 3, 7, 17):
            x = _activations(kind, rows, columns, dtype)
            bias = torch.randn(outputs).to(dtype)
            exact = _exact(x, weight, bias, group_size)
            decoded = (
                weight_levels(codes, scale, table, columns, group_size).double()
                * _per_column(scale_values(scale).double(), outputs, columns, group_size)
            ).abs()
            width = 128 if group_size <= 0 else group_size
            units = torch.zeros_like(x, dtype=torch.float64)
            for first in range(0, columns, width):
                block = x[:, first : first + width].double().abs()
                units[:, first : first + width] = block.amax(1, keepdim=True) * 2.0 ** (-22 if wide else -14)
            blocks = -(-columns // width)
            # Scales of activation blocks come down to 2^-126; times the weight's they may become subnormal,
            # with an absolute error of 2^-150 times a sum of at most 2^22 x 255 per column.
            underflow = least * 2.0**30 * columns if wide else least * 2.0**22 * columns
            sums = (x.double().abs() + units) @ decoded.T
            bound = units @ decoded.T + (2 * blocks + 4) * step * (sums + bias.double().abs()) + underflow
            relative, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
            bound = bound * (1 + relative) + relative * exact.abs().clamp(min=smallest)
            error = (_run(isa, x, weight, bias, group_size).double() - exact).abs()
            finite = exact.abs() < torch.finfo(dtype).max * (1 - relative)
            assert bool((error <= bound)[finite].all())


def _per_column(values: Tensor, rows: int, columns: int, group_size: int) -> Tensor:
    if group_size > 0:
        values = values.repeat_interleave(group_size, dim=1)[:, :columns]
    return values.expand(rows, columns)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_identity_weight_passes_what_the_fixed_point_holds_through_exactly(
    dtype: torch.dtype, isa: str
) -> None:
    """Level 1 of int4, scale 1, on the diagonal: outputs are the activations, multiples of a power of two."""
    size = 150
    codes = reference.ovp_encode_reference(
        torch.eye(size),
        torch.full((size, 1), 0x3F80, dtype=torch.int16),
        BOOKS["int4"].tensor(),
        -1,
        "optimal",
    )
    scale = torch.full((size, 1), 0x3F80, dtype=torch.int16)
    for rows in (1, 5, 18):
        for power in (-20, -3, 0):
            x = (torch.randint(-128, 129, (rows, size)) * 2.0**power).to(dtype)
            assert_same_bits(_run(isa, x, (codes, scale, BOOKS["int4"].tensor()), None, -1), x + 0.0)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column_at_a_time_reads_every_weight_exactly(dtype: torch.dtype, isa: str) -> None:
    """Unit vectors as activations give the decoded weight back, whatever group a column lies in."""
    for group_size in GROUP_SIZES:
        for book in BOOKS:
            codes, scale, table = random_weight(35, 139, group_size, book)
            expected = reference.ovp_decode_reference(codes, scale, table, 139, group_size, dtype).T
            found = _run(isa, torch.eye(139, dtype=dtype), (codes, scale, table), None, group_size)
            assert torch.equal(found, expected)


# ---- what is not finite, and shapes -----------------------------------------------------------------------


@EACH_ISA
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 4, 7, 18])
def test_a_row_that_is_not_finite_is_nan_and_no_other(rows: int, bad: float, isa: str) -> None:
    for group_size in (-1, 32):
        weight = random_weight(21, 137, group_size, "adaptive")
        for dtype in DTYPES:
            x = _activations("normal", rows, 137, dtype)
            clean = _run(isa, x, weight, None, group_size)
            for row, column in ((0, 0), (rows - 1, 136), (rows // 2, 64)):
                broken = x.clone()
                broken[row, column] = bad
                out = _run(isa, broken, weight, None, group_size)
                others = torch.arange(rows) != row
                assert bool(torch.isnan(out[row]).all())
                assert_same_bits(out[others], clean[others])


@EACH_ISA
def test_results_too_large_become_infinite_not_nan(isa: str) -> None:
    weight = random_weight(21, 64, 32, "adaptive")
    x = torch.full((5, 64), 60000.0, dtype=torch.float16)
    scale = torch.full_like(weight[1], 0x4400)  # 512, pair rule
    out = _run(isa, x, (weight[0], scale, weight[2]), None, 32)
    assert not torch.isnan(out).any()
    assert torch.isinf(out).any()


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_and_leading_dimensions(dtype: torch.dtype, isa: str) -> None:
    weight = random_weight(19, 70, 32, "adaptive")
    for shape in ((0, 70), (2, 0, 70)):
        out = _run(isa, torch.zeros(shape, dtype=dtype), weight, None, 32)
        assert out.shape == (*shape[:-1], 19)
        assert out.dtype == dtype
    flat = _activations("normal", 12, 70, dtype)
    expected = _run(isa, flat, weight, None, 32)
    for shape in ((3, 4), (2, 3, 2), (1, 12)):
        out = _run(isa, flat.view(*shape, 70), weight, None, 32)
        assert_same_bits(out, expected.view(*shape, 19))
    assert_same_bits(_run(isa, flat[0], weight, None, 32), expected[0])


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_needs_to_be_contiguous_and_nothing_is_changed(dtype: torch.dtype, isa: str) -> None:
    codes, scale, table = random_weight(19, 70, 32, "adaptive")
    bias = torch.randn(19)
    x = _activations("normal", 6, 70, dtype)
    expected = ovp_linear_fixed_point(x, codes, scale, table, bias, 32)
    for view in (strided(x), x.t().contiguous().t(), torch.cat((x, x), dim=1)[:, :70]):
        assert not view.is_contiguous()
        before = view.clone()
        weight = (strided(codes), strided(scale), strided(table))
        assert_same_bits(_run(isa, view, weight, strided(bias), 32), expected)
        assert torch.equal(view, before)


@EACH_ISA
def test_an_address_off_every_alignment_works(isa: str) -> None:
    """Views into a larger tensor, as sharded and memory-mapped checkpoints give, start anywhere."""
    codes, scale, table = random_weight(35, 140, 64, "adaptive")
    packed_codes, packed_scale = cpu.ovp_pack_cpu(codes, scale, 140, 64)
    x = _activations("normal", 6, 140, torch.bfloat16)
    expected = ovp_linear_fixed_point(x, codes, scale, table, None, 64)

    def shifted(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + 1)
        room[1:] = tensor.flatten()
        return room[1:].view(tensor.shape)

    out = cpu.ovp_linear_cpu(
        shifted(x), shifted(packed_codes), shifted(packed_scale), shifted(table), None, 35, 64, isa
    )
    assert_same_bits(out, expected)


@EACH_ISA
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_canonical_and_packed_codes_give_the_same(group_size: int, isa: str) -> None:
    codes, scale, table = random_weight(35, 203, group_size, "adaptive")
    packed = cpu.ovp_pack_cpu(codes, scale, 203, group_size)
    for dtype in DTYPES:
        for rows in (1, 6):
            x = _activations("normal", rows, 203, dtype)
            canonical = cpu.ovp_linear_cpu(x, codes, scale, table, None, 35, group_size, isa)
            assert_same_bits(cpu.ovp_linear_cpu(x, *packed, table, None, 35, group_size, isa), canonical)


def test_the_operator_runs_the_kernels() -> None:
    codes, scale, table = random_weight(35, 203, 64, "adaptive")
    x, bias = _activations("normal", 6, 203, torch.bfloat16), torch.randn(35)
    expected = ovp_linear_fixed_point(x, codes, scale, table, bias, 64)
    assert_same_bits(torch.ops.olive.ovp_linear(x, codes, scale, table, bias, 35, 64), expected)


def test_an_unknown_instruction_set_is_rejected() -> None:
    weight = random_weight(3, 5, 32, "int4")
    with pytest.raises(ValueError, match=r"isa: expected portable, avx2, .* got mmx"):
        _run("mmx", torch.ones(2, 5), weight, None, 32)
