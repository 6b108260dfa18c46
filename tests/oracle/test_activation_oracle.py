"""Activations, 8-bit weights and the paper's presets: package and NumPy implementation agree by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy_ovp as oracle
import pytest
import torch
from torch import Tensor, nn

import olive
from olive import ops, presets
from olive.formats import CODEBOOKS, GROUP_SIZES, PAIRINGS, Codebook, get_codebook, pack_scale, unpack_scale
from olive.ptq.grids import OVP8_GRID, PAPER_GRID
from tests import models


def _student(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, rows, columns, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _special(columns: int) -> Tensor:
    """Zeros, ties, values below 2^-60, an outlier, NaN and Inf in one group each."""
    x = _student(9, columns, 3)
    x[0] = 0.0
    x[1] = torch.arange(columns) * 0.5 - 20
    x[2] *= 2.0**-65
    x[3, columns // 2] = 900.0
    x[4, 0] = float("nan")
    x[5, columns - 1] = float("-inf")
    x[6, : columns // 2] = 0.0
    x[7] = -0.0
    return x


def _stored(book: Codebook | None) -> bytes | None:
    return None if book is None else bytes(book.tensor().view(torch.uint8).tolist())


FORMATS: list[tuple[str, Codebook | None]] = [("int8", None), ("ovp8", None)]
FORMATS += [("ovp4", book) for book in CODEBOOKS.values()]
IDS = [name if book is None else f"{name}-{book.name}" for name, book in FORMATS]


def _scale(value: float) -> Tensor:
    return pack_scale(torch.tensor([value]), torch.tensor([False]))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("name", "book"), FORMATS, ids=IDS)
def test_activations_agree(name: str, book: Codebook | None, group_size: int, pairing: str) -> None:
    table = None if book is None else book.tensor()
    for columns in (77, 130):
        x = _special(columns)
        for static in [0.013, 0.9] if group_size == 0 else [None]:
            stored = None if static is None else _scale(static)
            levels, scale = ops.quantize_activations(
                x, name, group_size, pairing, table, stored, torch.float32
            )
            pattern = None if stored is None else int(stored)
            with np.errstate(all="ignore"):
                theirs = oracle.quantize_activations(
                    x.numpy(), name, group_size, pairing, _stored(book), pattern
                )
            assert np.array_equal(levels.numpy(), theirs[0].astype(np.float32))
            assert np.array_equal(scale.numpy(), theirs[1], equal_nan=True)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("pairing", "grid"), [("optimal", OVP8_GRID[::4]), ("paper", PAPER_GRID)])
def test_eight_bit_search_agrees(pairing: str, grid: tuple[float, ...], group_size: int) -> None:
    weights = [_student(3, 150, 1), _special(77)[:4], _student(2, 33) * 2.0**-59]
    for weight in [*weights, torch.zeros(2, 5), torch.full((2, 40), -0.37)]:
        codes, scale = ops.ovp8_quantize(weight, group_size, pairing, list(grid))
        with np.errstate(all="ignore"):
            theirs = oracle.quantize8(weight.numpy(), group_size, pairing, list(grid))
        assert np.array_equal(scale.numpy(), theirs[1])
        assert np.array_equal(codes.numpy(), theirs[0])


def test_the_oracle_rounds_a_multiply_add_once() -> None:
    """Against exact rationals, on values whose sum in float64 lies near the middle of two float32."""
    from fractions import Fraction

    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(3000).astype(np.float32) for _ in range(3))
    c[::3] = -(a[::3] * b[::3])
    got = oracle.fused_multiply_add(a, b, c)
    for one, x, y, z in zip(got.tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = (float(np.nextafter(np.float32(one), np.float32(end))) for end in (-np.inf, np.inf))
        assert abs(exact - Fraction(one)) <= min(abs(exact - Fraction(below)), abs(exact - Fraction(above)))


@pytest.mark.parametrize("group_size", [32, -1, 0])
@pytest.mark.parametrize("activation_group_size", [64, 32, -1, 0])
@pytest.mark.parametrize(
    ("name", "book"), [("int8", None), ("ovp4", CODEBOOKS["adaptive"])], ids=["a8", "a4"]
)
def test_integer_linear_agrees(
    name: str, book: Codebook | None, activation_group_size: int, group_size: int
) -> None:
    weight, x, bias = _student(11, 150, 5) * 0.1, _student(5, 150, 6), _student(1, 11)[0]
    x[3, 7] = float("nan")
    weight_book = CODEBOOKS["adaptive"]
    codes, scale = ops.ovp_quantize(
        weight, weight_book.tensor(), group_size, "optimal", [0.6, 0.9], [0.8, 1.0], None
    )
    static = _scale(0.05) if activation_group_size == 0 else None
    table = None if book is None else book.tensor()
    arguments: tuple[Any, ...] = (name, activation_group_size, "optimal", table, static)
    got = ops.ovp_linear_quantized(x, codes, scale, weight_book.tensor(), bias, 11, group_size, *arguments)
    x_levels, x_scale = oracle.quantize_activations(
        x.numpy(),
        name,
        activation_group_size,
        "optimal",
        _stored(book),
        None if static is None else int(static),
    )
    value, plain = unpack_scale(scale)
    unit = torch.where(plain, 0x3F81, 0x3F80).to(torch.int16)
    stored = _stored(weight_book)
    assert stored is not None
    w_levels = oracle.decode(codes.numpy(), unit.numpy(), stored, 150, group_size).astype(np.int64)
    theirs = oracle.linear_quantized(
        x_levels, x_scale, w_levels, value.numpy(), bias.numpy(), group_size, activation_group_size
    )
    assert np.array_equal(got.numpy(), theirs, equal_nan=True)
    assert np.isnan(theirs[3]).all() and np.isfinite(theirs[:3]).all()


GRID = [round(0.75 + 0.05 * step, 2) for step in range(36)]  # section 8


def _paper_table(matrix: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    """int4 or flint4, by squared error of the decoded values."""
    best: tuple[float, tuple[Any, Any, bytes]] | None = None
    for name in ("int4", "flint4"):
        stored = _stored(get_codebook(name))
        assert stored is not None
        codes, scale = oracle.quantize(matrix, stored, group_size, "paper", GRID, [])
        decoded = oracle.decode(codes, scale, stored, matrix.shape[1], group_size)
        error = float(((matrix.astype(np.float64) - decoded) ** 2).sum())
        if best is None or error < best[0]:
            best = error, (codes, scale, stored)
    assert best is not None
    return best[1]


@pytest.mark.parametrize("preset", [presets.paper_w4a4, presets.paper_w8a8])
def test_presets_encode_as_the_paper_says(preset: Any) -> None:
    model = models.plain(columns=47, hidden=30)
    with torch.no_grad():  # a heavy tail for one of the two
        model[0].weight.copy_(_student(30, 47, 2) * 0.05)
    batch = _student(40, 47, 4)
    weights = {index: model[index].weight.detach().numpy().copy() for index in (0, 3)}
    with torch.no_grad():
        inputs = {0: batch, 3: model[:3](batch)}
    olive.quantize(model, preset(), calibration=[batch])
    for index, weight in weights.items():
        layer: Any = model[index]
        assert isinstance(layer, nn.Module)
        codes, scale, codebook = layer.canonical()
        sample = inputs[index].numpy()  # 40 rows: all of them are kept
        if preset is presets.paper_w8a8:
            theirs = (*oracle.quantize8(weight, -1, "paper", GRID), None)
            _, static = oracle.quantize8(sample, 0, "paper", GRID)
        else:
            theirs = _paper_table(weight, -1)
            _, static, table = _paper_table(sample, 0)
            assert _bytes(layer.activation_codebook) == table
            assert _bytes(codebook) == theirs[2]
        assert np.array_equal(codes.numpy(), theirs[0])
        assert np.array_equal(scale.numpy(), theirs[1])
        assert int(layer.activation_scale) == int(static[0, 0])


def _bytes(table: Tensor) -> bytes:
    return bytes(table.detach().view(torch.uint8).tolist())
