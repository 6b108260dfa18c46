"""The operators' definition: shapes, errors, and what the reference computes.

Errors and shapes hold for whatever implements an operator on this machine, so they are asked of the operator
and of the reference alike. Values of kernels are compared with the reference in their own tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from olive.formats import CODEBOOKS, GROUP_SIZES, codes_shape, get_codebook, ovp4_decode, scale_shape
from olive.ops import reference
from olive.ops.packed import CPU_LAYOUT
from olive.ops.reference import ordered_sum

NAMES = ("ovp_quantize", "ovp_encode", "ovp_decode", "ovp_pack", "ovp_unpack", "ovp_linear")
GRIDS = ([0.5, 0.8, 1.0], [0.7, 0.9])
SHAPES = ((1, 1), (5, 3), (17, 129), (32, 128))
Call = Callable[..., Any]


@pytest.fixture(params=["operator", "reference"])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls an operator by name, as dispatched or the reference itself."""

    def run(name: str, *arguments: Any) -> Any:
        if request.param == "operator":
            return getattr(torch.ops.olive, name)(*arguments)
        return getattr(reference, f"{name}_reference")(*arguments)

    return run


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight.view(-1)[:: max(2, weight.numel() // 9)] *= 12.0
    return weight


def _book(name: str = "adaptive") -> Tensor:
    return get_codebook(name).tensor()


def _quantized(
    rows: int, columns: int, group_size: int, name: str = "adaptive"
) -> tuple[Tensor, Tensor, Tensor]:
    book = _book(name)
    codes, scale = reference.ovp_quantize_reference(
        _weight(rows, columns), book, group_size, "optimal", *GRIDS, None
    )
    return codes, scale, book


def _arguments(name: str, rows: int, columns: int, group_size: int) -> tuple[Any, ...]:
    """Valid arguments of an operator."""
    weight = _weight(rows, columns)
    codes, scale, book = _quantized(rows, columns, group_size)
    if name == "ovp_quantize":
        return (weight, book, group_size, "optimal", *GRIDS, None)
    if name == "ovp_encode":
        return (weight, scale, book, group_size, "paper")
    if name == "ovp_decode":
        return (codes, scale, book, columns, group_size, torch.float32)
    if name == "ovp_pack":
        return (codes, scale, columns, group_size)
    if name == "ovp_unpack":
        packed = reference.ovp_pack_reference(codes, scale, columns, group_size)
        return (*packed, rows, columns, group_size)
    return (_weight(4, columns, seed=1), codes, scale, book, torch.ones(rows), rows, group_size)


# Schemas and fakes


@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, group_size: int) -> None:
    torch.library.opcheck(getattr(torch.ops.olive, name).default, _arguments(name, 20, 70, group_size))


def test_opcheck_of_linear_with_gradients_and_packed_codes() -> None:
    input, codes, scale, book, bias, rows, group_size = _arguments("ovp_linear", 20, 70, 32)
    packed = reference.ovp_pack_reference(codes, scale, 70, group_size)
    for stored in ((codes, scale), packed):
        arguments = (input.requires_grad_(), *stored, book, bias.requires_grad_(), rows, group_size)
        torch.library.opcheck(torch.ops.olive.ovp_linear.default, arguments)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_fake_and_real_results_are_alike(
    name: str, rows: int, columns: int, group_size: int, call: Call
) -> None:
    arguments = _arguments(name, rows, columns, group_size)
    real = call(name, *arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = getattr(torch.ops.olive, name)(*fakes)
    for ours, expected in zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
        assert ours.shape == expected.shape
        assert ours.dtype == expected.dtype
        assert ours.device == expected.device
        assert ours.is_contiguous()
        assert expected.is_contiguous()


# Errors


def _with(arguments: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:place], value, *arguments[place + 1 :])


BAD: list[tuple[str, int, Any, type[Exception], str]] = [
    (
        "ovp_quantize",
        0,
        torch.zeros(4, 70, dtype=torch.float64),
        TypeError,
        "weight: expected float32, bfloat16 or float16, got torch.float64",
    ),
    (
        "ovp_quantize",
        0,
        torch.zeros(4, 70, dtype=torch.int8),
        TypeError,
        "weight: expected float32, bfloat16 or float16, got torch.int8",
    ),
    (
        "ovp_quantize",
        0,
        torch.zeros(70),
        ValueError,
        "weight: expected shape [N, K] with N, K >= 1, got (70,)",
    ),
    (
        "ovp_quantize",
        0,
        torch.zeros(0, 70),
        ValueError,
        "weight: expected shape [N, K] with N, K >= 1, got (0, 70)",
    ),
    (
        "ovp_quantize",
        0,
        torch.zeros(4, 0),
        ValueError,
        "weight: expected shape [N, K] with N, K >= 1, got (4, 0)",
    ),
    ("ovp_quantize", 1, torch.zeros(32), TypeError, "codebook: expected torch.int8, got torch.float32"),
    (
        "ovp_quantize",
        1,
        torch.zeros(16, dtype=torch.int8),
        ValueError,
        "codebook: expected shape (32,), got (16,)",
    ),
    (
        "ovp_quantize",
        2,
        48,
        ValueError,
        "group_size: expected one of -1 (per channel), 0 (per tensor), 32, 64, 128, got 48",
    ),
    ("ovp_quantize", 3, "left", ValueError, "pairing: expected 'optimal' or 'paper', got 'left'"),
    (
        "ovp_quantize",
        4,
        [0.5, 0.0],
        ValueError,
        "pair_grid: expected positive finite multiples, got [0.5, 0.0]",
    ),
    ("ovp_quantize", 5, [-1.0], ValueError, "plain_grid: expected positive finite multiples, got [-1.0]"),
    (
        "ovp_quantize",
        5,
        [float("inf")],
        ValueError,
        "plain_grid: expected positive finite multiples, got [inf]",
    ),
    (
        "ovp_quantize",
        5,
        [float("nan")],
        ValueError,
        "plain_grid: expected positive finite multiples, got [nan]",
    ),
    (
        "ovp_quantize",
        6,
        torch.ones(70, dtype=torch.float64),
        TypeError,
        "importance: expected torch.float32, got torch.float64",
    ),
    ("ovp_quantize", 6, torch.ones(69), ValueError, "importance: expected shape (70,), got (69,)"),
    (
        "ovp_quantize",
        6,
        torch.full((70,), -1.0),
        ValueError,
        "importance: expected values from 0 to 2^64, got -1.0 to -1.0",
    ),
    (
        "ovp_quantize",
        6,
        torch.full((70,), float("nan")),
        ValueError,
        "importance: expected values from 0 to 2^64, got nan to nan",
    ),
    ("ovp_quantize", 6, torch.full((70,), 1e20), ValueError, "importance: expected values from 0 to 2^64"),
    ("ovp_encode", 0, torch.zeros(4, 70, dtype=torch.float64), TypeError, "weight: expected float32"),
    ("ovp_encode", 0, torch.zeros(70), ValueError, "weight: expected shape [N, K]"),
    ("ovp_encode", 1, torch.zeros(4, 3), TypeError, "scale: expected torch.int16, got torch.float32"),
    (
        "ovp_encode",
        1,
        torch.ones(4, 2, dtype=torch.int16),
        ValueError,
        "scale: expected shape (4, 3), got (4, 2)",
    ),
    (
        "ovp_encode",
        2,
        torch.zeros(31, dtype=torch.int8),
        ValueError,
        "codebook: expected shape (32,), got (31,)",
    ),
    ("ovp_encode", 3, 16, ValueError, "group_size: expected one of"),
    ("ovp_encode", 4, "", ValueError, "pairing: expected 'optimal' or 'paper', got ''"),
    ("ovp_decode", 0, torch.zeros(4, 35), TypeError, "codes: expected torch.uint8, got torch.float32"),
    (
        "ovp_decode",
        0,
        torch.zeros(35, dtype=torch.uint8),
        ValueError,
        "codes: expected shape [N, ceil(K / 2)], got (35,)",
    ),
    (
        "ovp_decode",
        0,
        torch.zeros(4, 34, dtype=torch.uint8),
        ValueError,
        "codes: expected shape (4, 35), got (4, 34)",
    ),
    (
        "ovp_decode",
        0,
        torch.zeros(0, 35, dtype=torch.uint8),
        ValueError,
        "out_features, in_features: expected at least 1, got 0, 70",
    ),
    (
        "ovp_decode",
        1,
        torch.zeros(4, 3, dtype=torch.bfloat16),
        TypeError,
        "scale: expected torch.int16, got torch.bfloat16",
    ),
    (
        "ovp_decode",
        1,
        torch.zeros(4, 1, dtype=torch.int16),
        ValueError,
        "scale: expected shape (4, 3), got (4, 1)",
    ),
    ("ovp_decode", 3, 72, ValueError, "codes: expected shape (4, 36), got (4, 35)"),
    ("ovp_decode", 3, 0, ValueError, "out_features, in_features: expected at least 1, got 4, 0"),
    ("ovp_decode", 4, 7, ValueError, "group_size: expected one of"),
    ("ovp_decode", 5, torch.int8, TypeError, "dtype: expected float32, bfloat16 or float16, got torch.int8"),
    (
        "ovp_pack",
        0,
        torch.zeros(1, 12, 64, dtype=torch.uint8),
        ValueError,
        "codes: expected shape [N, ceil(K / 2)], got (1, 12, 64)",
    ),
    (
        "ovp_pack",
        0,
        torch.zeros(4, 36, dtype=torch.uint8),
        ValueError,
        "codes: expected shape (4, 35), got (4, 36)",
    ),
    (
        "ovp_pack",
        1,
        torch.zeros(3, 3, dtype=torch.int16),
        ValueError,
        "scale: expected shape (4, 3), got (3, 3)",
    ),
    ("ovp_pack", 1, torch.zeros(4, 3), TypeError, "scale: expected torch.int16, got torch.float32"),
    (
        "ovp_unpack",
        0,
        torch.zeros(4, 35, dtype=torch.uint8),
        ValueError,
        "codes: expected packed shape [ceil(N / 16), K' / 8, 64], got (4, 35)",
    ),
    (
        "ovp_unpack",
        0,
        torch.zeros(2, 12, 64, dtype=torch.uint8),
        ValueError,
        "codes: expected shape (1, 12, 64), got (2, 12, 64)",
    ),
    (
        "ovp_unpack",
        1,
        torch.zeros(4, 3, dtype=torch.int16),
        ValueError,
        "scale: expected shape (1, 3, 16), got (4, 3)",
    ),
    ("ovp_unpack", 2, 0, ValueError, "out_features, in_features: expected at least 1, got 0, 70"),
    (
        "ovp_linear",
        0,
        torch.zeros(4, 70, dtype=torch.float64),
        TypeError,
        "input: expected float32, bfloat16 or float16, got torch.float64",
    ),
    ("ovp_linear", 0, torch.tensor(1.0), ValueError, "input: expected shape [..., K], got a scalar"),
    ("ovp_linear", 0, torch.zeros(4, 72), ValueError, "codes: expected shape (4, 36), got (4, 35)"),
    (
        "ovp_linear",
        0,
        torch.zeros(4, 0),
        ValueError,
        "out_features, in_features: expected at least 1, got 4, 0",
    ),
    (
        "ovp_linear",
        1,
        torch.zeros(4, 35, dtype=torch.int8),
        TypeError,
        "codes: expected torch.uint8, got torch.int8",
    ),
    (
        "ovp_linear",
        1,
        torch.zeros(1, 9, 64, dtype=torch.uint8),
        ValueError,
        "codes: expected shape (1, 12, 64), got (1, 9, 64)",
    ),
    ("ovp_linear", 2, torch.zeros(4, 3), TypeError, "scale: expected torch.int16, got torch.float32"),
    ("ovp_linear", 3, torch.zeros(32), TypeError, "codebook: expected torch.int8, got torch.float32"),
    ("ovp_linear", 4, torch.zeros(5), ValueError, "bias: expected shape (4,), got (5,)"),
    (
        "ovp_linear",
        4,
        torch.zeros(4, dtype=torch.int32),
        TypeError,
        "bias: expected float32, bfloat16 or float16, got torch.int32",
    ),
    ("ovp_linear", 5, 5, ValueError, "codes: expected shape (5, 35), got (4, 35)"),
    ("ovp_linear", 6, 1, ValueError, "group_size: expected one of"),
]


@pytest.mark.parametrize(("name", "place", "value", "error", "message"), BAD)
def test_bad_argument_is_rejected(
    name: str, place: int, value: Any, error: type[Exception], message: str, call: Call
) -> None:
    arguments = _with(_arguments(name, 4, 70, 32), place, value)
    with pytest.raises(error, match=re.escape(message)):
        call(name, *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ovp_quantize", "ovp_encode"])
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_weight_that_is_not_finite_is_rejected(
    name: str, value: float, dtype: torch.dtype, group_size: int, call: Call
) -> None:
    arguments = _arguments(name, 4, 70, group_size)
    weight = arguments[0].to(dtype)
    weight[3, 69] = value
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        call(name, *_with(arguments, 0, weight))


def test_search_without_a_candidate_is_rejected(call: Call) -> None:
    weight = _weight(2, 8)
    with pytest.raises(ValueError, match="at least one multiple in pair_grid or plain_grid, got none"):
        call("ovp_quantize", weight, _book(), 32, "optimal", [], [], None)
    with pytest.raises(ValueError, match="pair_grid: expected multiples for a codebook without plain levels"):
        call("ovp_quantize", weight, _book("int4"), 32, "optimal", [], [1.0], None)


@pytest.mark.parametrize(
    ("name", "place"), [("ovp_quantize", 1), ("ovp_encode", 2), ("ovp_decode", 2), ("ovp_linear", 3)]
)
def test_tensors_on_two_devices_are_rejected(name: str, place: int) -> None:
    arguments = _arguments(name, 4, 70, 32)
    with pytest.raises(ValueError, match=r"expected every tensor on one device, got .* on cpu, .* on meta"):
        getattr(reference, f"{name}_reference")(*_with(arguments, place, arguments[place].to("meta")))


@pytest.mark.parametrize("name", ["ovp_quantize", "ovp_encode", "ovp_decode", "ovp_linear"])
def test_reference_rejects_what_is_no_codebook(name: str) -> None:
    arguments = _arguments(name, 4, 70, 32)
    place = next(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.shape == (32,))
    bad = arguments[place].clone()
    bad[1] = 100  # no longer rising
    with pytest.raises(ValueError, match="normal: expected 8 rising magnitudes"):
        getattr(reference, f"{name}_reference")(*_with(arguments, place, bad))


# Values


def test_ordered_sum_adds_sixteen_lanes_and_folds_them() -> None:
    u = (
        2.0**-24
    )  # half a unit in the last place of 1: lost when added to 1, kept when added to another u first
    pairs = torch.full((2, 37), u)
    pairs[0, 0] = 1.0  # lane 0 stays 1; lanes 1 to 4 hold 3 u, the others 2 u
    # fold 8: 1 + 2 u, 5 u x 4, 4 u x 3; fold 4: 1 + 7 u is a tie and becomes 1 + 8 u, 9 u x 3;
    # fold 2: 1 + 17 u becomes 1 + 16 u, 18 u; fold 1: 1 + 34 u
    assert ordered_sum(pairs).dtype == torch.float64
    assert ordered_sum(pairs).tolist() == [1 + 34 * u, 37 * u]


def test_ordered_sum_adds_chunks_in_float64() -> None:
    pairs = torch.zeros(3, 1025)
    pairs[:, 0] = 1.0
    pairs[0, 511], pairs[1, 512], pairs[2, 1024] = 2.0**-40, 2.0**-40, 2.0**-41
    assert ordered_sum(pairs).tolist() == [1.0, 1.0 + 2.0**-40, 1.0 + 2.0**-41]


@pytest.mark.parametrize("rows", [1, 15, 16, 33])
@pytest.mark.parametrize("columns", [1, 2, 31, 64, 129, 300])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unpack_is_the_inverse_of_pack(rows: int, columns: int, group_size: int, call: Call) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 256, codes_shape(rows, columns), generator=generator, dtype=torch.uint8)
    shape = scale_shape(rows, columns, group_size)
    scale = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    packed_codes, packed_scale = call("ovp_pack", codes, scale, columns, group_size)
    assert tuple(packed_codes.shape) == CPU_LAYOUT.codes_shape(rows, columns, group_size)
    assert tuple(packed_scale.shape) == CPU_LAYOUT.scale_shape(rows, columns, group_size)
    unpacked = call("ovp_unpack", packed_codes, packed_scale, rows, columns, group_size)
    assert torch.equal(unpacked[0], codes)
    assert torch.equal(unpacked[1], scale)
    assert all(tensor.is_contiguous() for tensor in (packed_codes, packed_scale, *unpacked))


def test_pack_interleaves_sixteen_rows(call: Call) -> None:
    codes = torch.arange(17 * 16, dtype=torch.int32).remainder(251).to(torch.uint8).view(17, 16)
    scale = torch.arange(17, dtype=torch.int16)[:, None]
    packed_codes, packed_scale = call("ovp_pack", codes, scale, 32, 32)
    assert packed_codes.shape == (2, 4, 64)
    assert packed_scale.shape == (2, 1, 16)
    assert torch.equal(packed_codes[0, 2, 4 * 5 : 4 * 6], codes[5, 8:12])
    assert torch.equal(packed_codes[1, 3, :4], codes[16, 12:16])
    assert not bool(packed_codes[1, :, 4:].any())
    assert packed_scale[1, 0].tolist() == [16] + [0] * 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("book", CODEBOOKS)
def test_decode_rounds_the_exact_product_once(book: str, dtype: torch.dtype, call: Call) -> None:
    codes, scale, table = _quantized(5, 77, 32, book)
    decoded = call("ovp_decode", codes, scale, table, 77, 32, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, ovp4_decode(codes, scale, get_codebook(book), 77, 32).to(dtype))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", CODEBOOKS)
def test_encode_with_the_found_scales_gives_the_found_codes(book: str, group_size: int, call: Call) -> None:
    weight, table = _weight(5, 77), _book(book)
    codes, scale = call("ovp_quantize", weight, table, group_size, "optimal", *GRIDS, None)
    assert torch.equal(call("ovp_encode", weight, scale, table, group_size, "optimal"), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_widened_first(dtype: torch.dtype, call: Call) -> None:
    weight = _weight(4, 70).to(dtype)
    ours = call("ovp_quantize", weight, _book(), 32, "optimal", *GRIDS, None)
    wide = call("ovp_quantize", weight.float(), _book(), 32, "optimal", *GRIDS, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, wide, strict=True))


def test_inputs_are_left_alone_and_may_have_any_stride(call: Call) -> None:
    for name in NAMES:
        arguments = _arguments(name, 20, 70, 32)
        strided = [
            a.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(a, Tensor) else a for a in arguments
        ]
        before = [a.clone() if isinstance(a, Tensor) else a for a in strided]
        results = [call(name, *arguments), call(name, *strided)]
        for ours, other in zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True):
            assert torch.equal(ours, other)
        for a, b in zip(strided, before, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_importance_lowers_the_weighted_error(group_size: int, call: Call) -> None:
    weight = _weight(6, 200)
    importance = torch.logspace(-3, 3, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]

    def error(importance_used: Tensor | None) -> float:
        codes, scale = call(
            "ovp_quantize", weight, _book("nf4"), group_size, "optimal", *GRIDS, importance_used
        )
        decoded = ovp4_decode(codes, scale, get_codebook("nf4"), 200, group_size)
        return ((weight - decoded).double().square() * importance.double()).sum().item()

    assert error(importance) < error(None)


def test_all_alike_importance_changes_nothing(call: Call) -> None:
    arguments = _arguments("ovp_quantize", 6, 77, 32)
    plain, weighted = call("ovp_quantize", *arguments), call("ovp_quantize", *arguments[:6], torch.ones(77))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def _linear(
    input: Tensor, bias: Tensor | None, group_size: int, packed: bool, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's result, the float64 result, and the float64 sum of magnitudes."""
    columns = input.shape[-1]
    codes, scale, book = _quantized(rows, columns, group_size)
    weight = ovp4_decode(codes, scale, get_codebook("adaptive"), columns, group_size).double()
    if packed:
        codes, scale = reference.ovp_pack_reference(codes, scale, columns, group_size)
    out = reference.ovp_linear_reference(input, codes, scale, book, bias, rows, group_size)
    offset = torch.zeros(rows).double() if bias is None else bias.double()
    exact = input.double() @ weight.T + offset
    return out, exact, input.double().abs() @ weight.T.abs() + offset.abs()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 129), (33, 200)])
def test_linear_against_float64(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, packed: bool
) -> None:
    """Float32 sums of K + 1 terms err by at most (K + 1) 2^-24 of the magnitudes' sum; then one rounding."""
    for bias in (None, _weight(1, rows, seed=2)[0].to(dtype)):
        input = _weight(3, columns, seed=1).to(dtype)
        out, exact, magnitude = _linear(input, bias, group_size, packed, rows)
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() if dtype != torch.float32 else 0.0
        tolerance = (columns + 1) * 2.0**-24 * magnitude * 1.01 + rounding * 1.01 + 1e-7
        assert out.dtype == dtype
        assert out.shape == exact.shape
        assert bool(((out.double() - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70), (2, 3, 70), (1, 70)])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...], call: Call) -> None:
    arguments = _arguments("ovp_linear", 5, 70, 32)
    out = call("ovp_linear", *_with(arguments, 0, torch.ones(shape)))
    assert out.shape == (*shape[:-1], 5)


def test_linear_with_an_identity_input_gives_the_decoded_weight() -> None:
    codes, scale, book = _quantized(7, 33, 32)
    out = reference.ovp_linear_reference(torch.eye(33), codes, scale, book, None, 7, 32)
    assert torch.equal(out.T, ovp4_decode(codes, scale, get_codebook("adaptive"), 33, 32))


def test_linear_passes_nan_and_inf_on(call: Call) -> None:
    arguments = _arguments("ovp_linear", 5, 70, 32)
    input = torch.ones(3, 70)
    input[1, 4] = float("nan")
    out = call("ovp_linear", *_with(arguments, 0, input))
    assert torch.isfinite(out[[0, 2]]).all()
    assert torch.isnan(out[1]).all()
