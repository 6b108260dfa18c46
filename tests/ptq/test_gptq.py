"""Pair-aware GPTQ against exhaustive search, its own definition in float64, and what it must never do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.config import QuantConfig
from olive.formats import CODEBOOKS, ovp4_decode, ovp4_validate, unpack_scale
from olive.formats.codebooks import Codebook
from olive.formats.ovp4 import level_tables
from olive.ptq import gptq, quantize_weight
from olive.ptq.gptq import compensate
from olive.ptq.moments import Drift


def _inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated, with a few channels much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(rows, columns, generator=generator) @ (torch.eye(columns) + mix)
    x[:, :: max(2, columns // 5)] *= 8
    return x


def _weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal / torch.rand(rows, columns, generator=generator).clamp(min=0.05).sqrt()


def _decoded(weight: Tensor, found: gptq.Compensated, book: Codebook, group_size: int) -> Tensor:
    return ovp4_decode(found.codes, found.scale, book, weight.shape[1], group_size)


def _output_error(weight: Tensor, decoded: Tensor, h: Tensor) -> float:
    error = (weight - decoded).double()
    return float(((error @ h.double()) * error).sum())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 0])
@pytest.mark.parametrize("codebook", ["int4", "flint4", "nf4", "adaptive"])
@pytest.mark.parametrize("order", [False, True])
def test_codes_are_valid_and_the_loss_is_that_of_the_output(
    group_size: int, codebook: str, order: bool
) -> None:
    columns = 139 if (group_size, codebook) == (64, "adaptive") else 37
    weight, x, book = _weight(24, columns), _inputs(400, columns), CODEBOOKS[codebook]
    h = x.T @ x
    found = compensate(weight, h, book, group_size, damping=0.02, activation_order=order)
    ovp4_validate(
        found.codes, found.scale, book.tensor(), out_features=24, in_features=columns, group_size=group_size
    )
    # The sum of all e_j^2 is the error under the damped H, whichever way the codes were chosen.
    damping = 0.02 * float(torch.nn.functional.pad(h.diagonal(), (0, columns % 2)).mean())
    damped = h + damping * torch.eye(columns)
    expected = _output_error(weight, _decoded(weight, found, book, group_size), damped)
    assert found.loss == pytest.approx(expected / _output_error(weight, 0 * weight, h), rel=1e-3)
    assert found.damping == 0.02


def _all_pairs(book: Codebook, plain: bool) -> Tensor:
    """Every pair of levels that a byte can hold, [count, 2]."""
    normal, outlier, levels = level_tables(book).float()
    if plain:
        return torch.cartesian_prod(levels, levels)
    zero = torch.zeros(1)
    past = outlier[outlier != 0]
    return torch.cat(
        (
            torch.cartesian_prod(normal.unique(), normal.unique()),
            torch.cartesian_prod(past, zero),
            torch.cartesian_prod(zero, past),
        )
    )


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.9])
@pytest.mark.parametrize("codebook", ["int4", "nf4", "adaptive"])
def test_a_pair_is_decided_together(
    codebook: str, correlation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "MULTIPLES", (1.0,))
    book = CODEBOOKS[codebook]
    weight = _weight(300, 2, seed=7)
    h = torch.tensor([[1.0, 0.7 * correlation], [0.7 * correlation, 0.49]])
    found = compensate(weight, h, book, -1, damping=1e-6)
    decoded = _decoded(weight, found, book, -1)
    scale, plain = unpack_scale(found.scale[:, 0])
    reached = least = 0.0
    for row in range(len(weight)):
        if bool(plain[row]):
            continue  # there columns go one by one
        error = weight[row] - _all_pairs(book, False) * scale[row]
        least += float(((error @ h) * error).sum(1).min())
        reached += _output_error(weight[row : row + 1], decoded[row : row + 1], h)
    assert least > 0
    assert reached <= 1.001 * least


def test_without_correlation_it_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MULTIPLES", (1.0,))
    weight = _weight(16, 256)
    found = compensate(weight, torch.eye(256), CODEBOOKS["int4"], 64)
    codes, scale, _ = quantize_weight(weight, QuantConfig(codebook="int4", group_size=64))
    assert torch.equal(found.codes, codes) and torch.equal(found.scale, scale)


@pytest.mark.parametrize("codebook", ["int4", "nf4", "adaptive"])
@pytest.mark.parametrize("order", [False, True])
def test_makes_up_for_errors(codebook: str, order: bool) -> None:
    weight, x, book = _weight(64, 192), _inputs(2000, 192), CODEBOOKS[codebook]
    h = x.T @ x
    found = compensate(weight, h, book, 128, activation_order=order)
    stored = quantize_weight(weight, QuantConfig(codebook=codebook), importance=h.diagonal() / h.max())
    searched = ops.ovp_decode(*stored, 192, 128, torch.float32)
    assert _output_error(weight, _decoded(weight, found, book, 128), h) < 0.6 * _output_error(
        weight, searched, h
    )


def test_more_scales_lose_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, book = _weight(64, 128), _inputs(2000, 128), CODEBOOKS["adaptive"]
    losses = []
    for multiples in ((1.0,), gptq.MULTIPLES):
        monkeypatch.setattr(gptq, "MULTIPLES", multiples)
        losses.append(compensate(weight, x.T @ x, book, 128).loss)  # one group: no later one to lose in
    assert losses[1] < losses[0]


def test_channels_and_scale_of_the_data_do_not_matter() -> None:
    weight, x, book = _weight(8, 64), _inputs(300, 64), CODEBOOKS["adaptive"]
    small, large = (compensate(weight, factor * (x.T @ x), book, 32) for factor in (2.0**-30, 2.0**20))
    assert torch.equal(small.codes, large.codes) and torch.equal(small.scale, large.scale)
    assert small.loss == pytest.approx(large.loss, rel=1e-4)


def test_singular_moments() -> None:
    weight, x, book = _weight(8, 64), _inputs(300, 64), CODEBOOKS["adaptive"]
    x[:, 5] = 0  # a dead column
    x[:, 9] = x[:, 8]  # two that are one
    few = x[:3]  # fewer rows than columns
    for rows in (x, few):
        found = compensate(weight, rows.T @ rows, book, 32)
        decoded = _decoded(weight, found, book, 32)
        assert bool(torch.isfinite(decoded).all()) and math.isfinite(found.loss)
        assert float((decoded - weight)[:, 5].abs().max()) < float(weight.abs().max())


def test_damping_grows_where_it_has_to() -> None:
    h = torch.eye(4)
    h[0, 1] = h[1, 0] = 1.05  # not positive semidefinite: rounding errors of a sum can do that
    found = compensate(_weight(3, 4), h, CODEBOOKS["nf4"], -1, damping=0.01)
    assert 0.05 < found.damping <= 1


def _drift(z: Tensor, x: Tensor) -> Drift:
    return Drift((z - x).T @ x, float((z - x).square().sum()), len(x))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("columns", [64, 37])
def test_makes_up_for_what_the_inputs_lost(order: bool, columns: int) -> None:
    weight, z, book = _weight(16, columns), _inputs(600, columns), CODEBOOKS["adaptive"]
    x = z + 0.2 * z.roll(1, 1) + 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    h, drift = x.T @ x, _drift(z, x)
    errors = []
    for known in (None, drift):
        found = compensate(weight, h, book, 32, activation_order=order, drift=known)
        errors.append(float((_decoded(weight, found, book, 32) @ x.T - weight @ z.T).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_the_weight_that_is_quantized_is_the_nearest_on_the_new_inputs() -> None:
    weight, z = _weight(4, 16), _inputs(300, 16)
    x = z + 0.1 * z.roll(1, 1)
    h = (x.T @ x).double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    best = weight + weight.double() @ ((z - x).T @ x).double() @ torch.linalg.inv(damped)
    one = compensate(weight, h.float(), CODEBOOKS["nf4"], -1, drift=_drift(z, x))
    other = compensate(best.float(), h.float(), CODEBOOKS["nf4"], -1)
    decoded = [ovp4_decode(found.codes, found.scale, CODEBOOKS["nf4"], 16, -1) for found in (one, other)]
    losses = [float(((d - best) @ damped * (d - best)).sum()) for d in decoded]
    assert losses[0] == pytest.approx(
        losses[1], rel=0.2
    )  # scales are chosen from one weight and from the other


@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize("related", [False, True])
def test_of_the_drift_only_what_is_no_accident_is_made_up_for(rows: int, related: bool) -> None:
    weight, book, inputs = _weight(16, 64), CODEBOOKS["adaptive"], _inputs(rows + 2000, 64)
    drift = 0.2 * inputs.roll(1, 1) if related else torch.zeros_like(inputs)
    noise = 0.3 * inputs.std() * torch.randn(rows, 64, generator=torch.Generator().manual_seed(11))
    x, z = inputs[:rows], inputs[:rows] + drift[:rows] + noise
    new, wanted = inputs[rows:], weight @ (inputs[rows:] + drift[rows:]).T
    errors = []
    for known in (None, _drift(z, x)):
        found = compensate(weight, x.T @ x, book, 32, drift=known)
        errors.append(float((_decoded(weight, found, book, 32) @ new.T - wanted).square().sum()))
    # 64 columns explain most of 100 rows of anything: nothing of it is believed.
    if rows == 100:
        assert errors[1] == errors[0]
    else:
        assert errors[1] < (0.5 if related else 1.05) * errors[0]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_moments_that_say_nothing_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="second_moment: expected a finite, positive diagonal"):
        compensate(_weight(3, 4), value * torch.eye(4), CODEBOOKS["nf4"], -1)


def test_indefinite_moments_are_refused() -> None:
    h = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(ValueError, match="positive definite matrix with damping 1"):
        compensate(_weight(3, 2), h, CODEBOOKS["nf4"], -1)


def test_the_weight_is_not_changed_and_zeros_stay_zeros() -> None:
    x = _inputs(300, 64)
    for weight in (_weight(8, 64), torch.zeros(8, 64), _weight(8, 64).bfloat16()):
        before = weight.clone()
        found = compensate(weight, x.T @ x, CODEBOOKS["adaptive"], 32)
        assert torch.equal(weight, before)
        if not bool(weight.any()):
            assert found.loss == 0 and not bool(_decoded(weight, found, CODEBOOKS["adaptive"], 32).any())
