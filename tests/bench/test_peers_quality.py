"""Our definitions of formats against the packages that they come from, where these are installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import peers_quality as peers
from bench.baselines import hqq, int4_asymmetric, nf4_absmax, nf4_double_quant
from bench.gptq_int import gptq_int

# Not ours to change: what importing these packages, or calling them, warns about.
pytestmark = pytest.mark.filterwarnings("ignore")


def draw(columns: int = 512) -> Tensor:
    return 0.02 * torch.randn(96, columns) * torch.linspace(0.2, 2, 96)[:, None]


@pytest.mark.parametrize("group_size", [64, 128])
def test_nf4_is_that_of_bitsandbytes(group_size: int) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional peer")
    weight = draw()
    own, package = nf4_absmax(weight, group_size), peers.bitsandbytes_nf4(weight, group_size)
    assert own.weight.equal(package.weight)
    assert own.bits_per_weight == package.bits_per_weight


@pytest.mark.parametrize("group_size", [64, 128])
def test_double_quantization_is_that_of_bitsandbytes(group_size: int) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional peer")
    weight = draw()
    own, package = nf4_double_quant(weight, group_size), peers.bitsandbytes_nf4_double(weight, group_size)
    # The mean of the maxima is added up in another order.
    torch.testing.assert_close(own.weight, package.weight, rtol=1e-5, atol=1e-8)
    assert own.bits_per_weight == package.bits_per_weight


@pytest.mark.parametrize("group_size", [64, 128])
def test_hqq_is_that_of_hqq(group_size: int) -> None:
    pytest.importorskip("hqq", reason="an optional peer")
    weight = draw()
    own, package = hqq(weight, group_size), peers.hqq_package(weight, group_size)
    step = (weight.amax() - weight.amin()) / 15
    # A rounding of the zero point in float16 may fall to the other side.
    assert ((own.weight - package.weight).abs() <= 1e-2 * step).all()
    assert own.bits_per_weight == package.bits_per_weight


@pytest.mark.slow
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_is_as_good_as_that_of_gptqmodel(activation_order: bool) -> None:
    pytest.importorskip("gptqmodel", reason="an optional peer")
    weight = draw(256)
    inputs = torch.randn(2000, 256) @ (torch.eye(256) + 0.2 * torch.randn(256, 256))
    moment = inputs.T @ inputs

    def loss(decoded: Tensor) -> float:
        error = decoded - weight
        return float(((error @ moment) * error).sum() / ((weight @ moment) * weight).sum())

    # Its damping; its own default order of columns has no counterpart in ours.
    own = gptq_int(weight, moment, 128, damping=0.05, activation_order=activation_order)
    package = peers.gptqmodel_int4(weight, moment, activation_order=activation_order)
    assert own.bits_per_weight == package.bits_per_weight
    assert abs(loss(own.weight) / loss(package.weight) - 1) <= 0.05
    assert loss(package.weight) < 0.8 * loss(int4_asymmetric(weight, 128).weight)


def test_without_packages_there_are_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert peers.data_free_peers() == []
    assert peers.gptq_peers() == []
