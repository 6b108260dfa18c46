"""Static scales and figures of a calibration sample, the sample itself, and searches for 8 bits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olive import ops
from olive.config import QuantConfig
from olive.formats import ActivationFormat, get_codebook, ovp8_decode, ovp8_validate, pack_scale, unpack_scale
from olive.ptq import OVP8_GRID, PAPER_GRID, quantize_weight, quantize_weight8
from olive.ptq.activations import StaticScale, activation_figures, static_scale
from olive.ptq.calibration import SAMPLE_ROWS, InputCollector, InputSample
from olive.ptq.grids import WIDE_PAIR_GRID
from olive.ptq.noise import column_energies

CPU = torch.device("cpu")


def _student(freedom: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(freedom + 1, rows, columns, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _sample(rows: Tensor) -> InputSample:
    return InputSample().updated(rows, float(rows.abs().max()))


# Weights of 8 bits, and the paper's choice of a codebook


def test_grid_of_eight_bits() -> None:
    assert OVP8_GRID[:36] == PAPER_GRID and (len(OVP8_GRID), OVP8_GRID[-1]) == (76, 17.6)
    assert all(1.0 < high / low < 1.07 for low, high in itertools.pairwise(OVP8_GRID))


def _error8(weight: Tensor, codes: Tensor, scale: Tensor, group_size: int) -> float:
    decoded = ovp8_decode(codes, scale, weight.shape[1], group_size)
    return float((decoded - weight).double().square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("group_size", [128, -1, 0])
def test_no_better_scale_lies_outside_the_grid_of_eight_bits(group_size: int) -> None:
    far = [0.1 * 1.02**step for step in range(300)]
    for weight, allowed in (
        (_student(200, 16, 512), 1.03),
        (_student(4, 16, 512), 1.06),
        (_student(3, 16, 512), 1.09),
    ):
        found = quantize_weight8(weight, QuantConfig(bits=8, group_size=group_size))
        ovp8_validate(*found, out_features=16, in_features=512, group_size=group_size)
        best = ops.ovp8_quantize(weight, group_size, "optimal", far)
        assert _error8(weight, *found, group_size) <= allowed * _error8(weight, *best, group_size)
        paper = quantize_weight8(weight, QuantConfig(bits=8, group_size=group_size, method="paper"))
        expected = ops.ovp8_quantize(weight, group_size, "paper", list(PAPER_GRID))
        assert all(torch.equal(one, other) for one, other in zip(paper, expected, strict=True))
        assert _error8(weight, *found, group_size) <= 1.001 * _error8(weight, *paper, group_size)


@pytest.mark.parametrize("method", ["search", "paper"])
def test_paper_codebook_is_the_better_of_two(method: str) -> None:
    kinds = set()
    uniform = torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    for weight in (uniform, _student(3, 16, 256)):
        found = quantize_weight(weight, QuantConfig(codebook="paper", method=method, group_size=-1))
        errors = {}
        for name in ("int4", "flint4"):
            one = quantize_weight(weight, QuantConfig(codebook=name, method=method, group_size=-1))
            decoded = ops.ovp_decode(*one, 256, -1, torch.float32)
            errors[name] = float((decoded - weight).square().sum()), one
        least = min(errors, key=lambda name: errors[name][0])
        kinds.add(least)
        assert all(torch.equal(a, b) for a, b in zip(found, errors[least][1], strict=True))
    assert kinds == {"int4", "flint4"} or method == "search"


def test_bits_have_a_function_each() -> None:
    weight = torch.randn(3, 8)
    with pytest.raises(ValueError, match="config: expected bits=4, got 8; see quantize_weight8"):
        quantize_weight(weight, QuantConfig(bits=8))
    with pytest.raises(ValueError, match="config: expected bits=8, got 4; see quantize_weight"):
        quantize_weight8(weight, QuantConfig())
    with pytest.raises(ValueError, match="importance: expected None with method 'paper', got a tensor"):
        quantize_weight(weight, QuantConfig(codebook="paper", method="paper"), importance=torch.ones(8))
    with pytest.raises(ValueError, match=r"fc.weight: expected finite values, got nan at \[0, 0\]"):
        quantize_weight8(weight * math.nan, QuantConfig(bits=8), name="fc.weight")


# Static scales


def test_int8_takes_the_largest_of_everything_seen() -> None:
    sample = _sample(torch.randn(10, 32))
    sample = InputSample(sample.rows, sample.keys, sample.seen, 12.7)
    found = static_scale(sample, ActivationFormat("int8", 0), None, CPU)
    assert found.codebook is None
    assert torch.equal(found.scale, pack_scale(torch.tensor([12.7 / 127]), torch.tensor([False])))


@pytest.mark.parametrize("pairing", ["optimal", "paper"])
@pytest.mark.parametrize("codebook", ["int4", "flint4", "nf4", "adaptive"])
def test_ovp4_is_searched_like_a_weight_under_the_pair_rule(codebook: str, pairing: str) -> None:
    rows, table = _student(4, 40, 64), get_codebook(codebook).tensor()
    grid = list(PAPER_GRID if pairing == "paper" else WIDE_PAIR_GRID)
    found = static_scale(_sample(rows), ActivationFormat("ovp4", 0, codebook, pairing), None, CPU)  # type: ignore[arg-type]
    _, expected = ops.ovp_quantize(rows, table, 0, pairing, grid, [], None)
    assert torch.equal(found.scale, expected[0]) and not bool(unpack_scale(found.scale)[1])
    assert found.codebook is not None and torch.equal(found.codebook, table)


@pytest.mark.parametrize("pairing", ["optimal", "paper"])
def test_ovp8_is_searched_like_a_weight(pairing: str) -> None:
    rows = _student(4, 40, 64)
    grid = list(PAPER_GRID if pairing == "paper" else OVP8_GRID)
    found = static_scale(_sample(rows), ActivationFormat("ovp8", 0, pairing=pairing), None, CPU)  # type: ignore[arg-type]
    assert torch.equal(found.scale, ops.ovp8_quantize(rows, 0, pairing, grid)[1][0])


@pytest.mark.parametrize("name", ["ovp4", "ovp8"])
def test_columns_that_meet_small_weights_count_less(name: str) -> None:
    # 50-fold values in columns whose weights are 50 times smaller: to the output, channels like any other.
    generator = torch.Generator().manual_seed(5)
    rows, weight = torch.randn(64, 128, generator=generator), torch.randn(32, 128, generator=generator)
    rows[:, ::8] *= 50
    weight[:, ::8] /= 50
    format = ActivationFormat(name, 0)
    weighed, even = (
        static_scale(_sample(rows), format, energy, CPU) for energy in (column_energies(weight), None)
    )

    def output_error(found: StaticScale) -> float:
        levels, step = ops.quantize_activations(
            rows, name, 0, "optimal", found.codebook, found.scale, torch.float32
        )
        return float(((rows - levels * step) @ weight.T).square().sum())

    assert unpack_scale(weighed.scale)[0] < unpack_scale(even.scale)[0]
    assert output_error(weighed) < 0.9 * output_error(even)


def test_a_weight_of_zeros_leaves_the_plain_error() -> None:
    sample, format = _sample(_student(4, 40, 64)), ActivationFormat("ovp8", 0)
    assert torch.equal(
        static_scale(sample, format, torch.zeros(64), CPU).scale,
        static_scale(sample, format, None, CPU).scale,
    )


def test_paper_activations_choose_int4_or_flint4() -> None:
    format = ActivationFormat("ovp4", 0, "paper", "paper")
    names = {name: get_codebook(name).tensor() for name in ("int4", "flint4")}
    uniform = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    heavy = _student(2, 64, 64)
    for rows, expected in ((uniform, "int4"), (heavy, "flint4")):
        found = static_scale(_sample(rows), format, None, CPU)
        assert found.codebook is not None and torch.equal(found.codebook, names[expected])


def test_an_input_of_zeros_gets_scale_one() -> None:
    for format in (ActivationFormat("int8", 0), ActivationFormat("ovp4", 0), ActivationFormat("ovp8", 0)):
        found = static_scale(_sample(torch.zeros(5, 8)), format, None, CPU)
        assert int(found.scale) == 0x3F80
        figures = activation_figures(_sample(torch.zeros(5, 8)), format, found.codebook, found.scale)
        assert figures.sqnr_db == math.inf and figures.outlier_share == figures.clipped_share == 0


# Figures


@pytest.mark.parametrize("group_size", [-1, 32, 0])
@pytest.mark.parametrize(
    ("name", "codebook"), [("int8", ""), ("ovp8", ""), ("ovp4", "int4"), ("ovp4", "adaptive")]
)
def test_figures_are_counted_by_hand(name: str, codebook: str, group_size: int) -> None:
    rows = _student(3, 30, 64)
    rows[:, 5] *= 40
    more: Any = {"codebook": codebook} if codebook else {}
    format = ActivationFormat(name, group_size, **more)
    table = get_codebook(codebook).tensor() if codebook else None
    scale = static_scale(_sample(rows), format, None, CPU).scale if group_size == 0 else None
    figures = activation_figures(_sample(rows), format, table, scale)
    levels, steps = ops.quantize_activations(rows, name, group_size, "optimal", table, scale, torch.float32)
    if group_size > 0:
        steps = steps.repeat_interleave(group_size, 1)
    noise = (levels * steps - rows).double().square().sum()
    expected = float(10 * torch.log10(rows.double().square().sum() / noise))
    assert figures.sqnr_db == pytest.approx(expected, abs=1e-6)
    largest = {"int8": 127.5, "ovp8": 33792.0}.get(name, 112.0 if codebook == "int4" else 135.0)
    assert figures.clipped_share == pytest.approx(float((rows.abs() > largest * steps.abs()).double().mean()))
    normal = {"ovp8": 127, "int8": 127}.get(name, 7)
    if codebook != "adaptive":  # plain levels of adaptive are as large as outliers
        outliers = (levels.abs() > normal).unflatten(1, (-1, 2)).any(-1)
        assert figures.outlier_share == pytest.approx(float(outliers.double().mean()))
    else:
        assert 0 < figures.outlier_share < 0.2


# The sample


def test_a_sample_is_bounded_even_and_repeatable() -> None:
    """Row i holds i; every tenth of 40 batches should send about a tenth of the rows."""
    counts = torch.zeros(10)
    for start in range(20):
        sample = InputSample(seen=start * 1000)  # another seed
        for batch in range(40):
            rows = torch.arange(batch * 100, batch * 100 + 100).float()[:, None].repeat(1, 4)
            sample = sample.updated(rows, float(rows.max()))
        assert sample.rows is not None and sample.rows.shape == (SAMPLE_ROWS, 4)
        assert len(set(sample.rows[:, 0].tolist())) == SAMPLE_ROWS
        counts += torch.histc(sample.rows[:, 0], 10, 0, 4000)
    assert sample.largest == 3999.0
    share = counts / counts.sum()
    # Standard deviation of a share over 20 x 256 rows: 0.004.
    assert bool(((share - 0.1).abs() <= 0.02).all())
    again = [InputSample().updated(torch.arange(600.0)[:, None], 599.0) for _ in range(2)]
    assert torch.equal(again[0].rows, again[1].rows)  # type: ignore[arg-type]


def test_layers_with_one_input_share_the_sample_until_their_inputs_differ() -> None:
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "o")})
    collector = InputCollector({name: layers[name] for name in layers})
    with collector.collecting():
        for _ in range(2):
            x = torch.randn(300, 8)
            layers["o"](layers["q"](x) + layers["k"](x))
            collector.end_batch()
        found = collector.samples()
        assert found["q"] is found["k"] and found["q"] is not found["o"]
        layers["q"](torch.randn(5, 8))
        layers["k"](torch.randn(5, 8))
    found = collector.samples()
    assert found["q"] is not found["k"] and found["q"].seen == found["k"].seen == 605
    layers["q"](torch.randn(5, 8))
    assert collector.samples()["q"].seen == 605  # hooks are off


def test_kwargs_vectors_and_empty_inputs() -> None:
    linear, unused = nn.Linear(8, 4), nn.Linear(8, 4)
    collector = InputCollector({"a": linear, "b": unused})
    with collector.collecting():
        linear(input=torch.randn(2, 3, 8))
        linear(torch.randn(8))
        unused(torch.randn(0, 8))
    assert set(collector.samples()) == {"a"} and collector.samples()["a"].seen == 7
