"""The dampening loss and its gradient against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from olive.qat import QATConfig, dampening_loss, prepare
from olive.qat.latent import latent_weights
from tests import models
from tests.qat.subjects import images, tiny_vit


def prepared(weights: str, bits: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    return prepare(model, QATConfig(bits, None, weights))


def test_statsq_by_hand() -> None:
    """Two bits; magnitudes of each row have the mean 1, so s = 2, the step is 1, levels +-1/2 and +-3/2."""
    model = prepared("statsq", 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.4, -0.8, 1.2, -1.6], [0.5, 0.5, 0.25, 2.75]]))
    loss = dampening_loss(model)
    loss.backward()
    # Distances to the level: beyond the last one (-1.6, 2.75) none.
    first, second = torch.tensor([-0.1, -0.3, -0.3, 0.0]), torch.tensor([0.0, 0.0, -0.25, 0.0])
    assert loss.item() == pytest.approx(float((first**2).mean() + (second**2).mean()))
    expected = torch.stack((2 * first / 4, 2 * second / 4))
    assert torch.allclose(model[1].weight.grad, expected, atol=1e-6)
    assert model[0].weight.grad is None and model[2].weight.grad is None


def test_lsq_by_hand() -> None:
    """Two bits with a scale of 1/2: levels -1, -1/2, 0 and 1/2."""
    model = prepared("lsq", 2)
    with torch.no_grad():
        model[1].weight_quantizer.scale.fill_(0.5)
        model[1].weight.copy_(torch.tensor([[0.1, -0.3, 0.45, 0.9], [-0.6, -0.9, -1.3, 0.3]]))
    loss = dampening_loss(model)
    loss.backward()
    distances = torch.tensor([[0.1, 0.2, -0.05, 0.0], [-0.1, 0.1, 0.0, -0.2]])
    assert loss.item() == pytest.approx(float(distances.square().mean(1).sum()))
    assert torch.allclose(model[1].weight.grad, distances / 2, atol=1e-6)
    assert model[1].weight_quantizer.scale.grad is None


def test_weights_on_their_levels_cost_nothing() -> None:
    model = prepared("lsq", 3)
    with torch.no_grad():
        model[1].weight.copy_(model[1].quantized_weight())
    loss = dampening_loss(model)
    assert loss.item() == pytest.approx(0, abs=1e-10)


def _independent(weight: Tensor, levels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (levels - torch.minimum(torch.maximum(weight, low), high)).square().mean(1).sum()


@pytest.mark.parametrize("name", ["vit", "conv1d", "merged", "groups"])
def test_whole_models(name: str) -> None:
    if name == "conv1d":
        model = prepare(models.gpt2(), QATConfig(2))
    else:
        more = {"merged": {"qkr": True}, "groups": {"group_size": 12}}.get(name, {})
        model = prepare(tiny_vit(), QATConfig(2, **more), batch=images())
    loss = dampening_loss(model)
    loss.backward()
    expected = torch.zeros(())
    for latent in latent_weights(model).values():
        weight = latent.latent().flatten(1)
        levels = latent.weight_quantizer(weight)
        step = latent.grid().step
        step = step.repeat_interleave(-(-weight.shape[1] // step.shape[1]), 1)[:, : weight.shape[1]]
        expected = expected + _independent(weight, levels, -1.5 * step, 1.5 * step)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [one.weight for one in latent_weights(model).values() if hasattr(one, "weight")]
    assert all(bool(one.grad.abs().sum() > 0) for one in trained)
    if name == "merged":
        assert bool(model.vit.layers[0].attention.q_proj.weight.grad.abs().sum() > 0)
    others = {id(one) for one in model.parameters()} - {id(one) for one in trained}
    if name != "merged":
        assert all(one.grad is None for one in model.parameters() if id(one) in others)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a prepared model"):
        dampening_loss(models.plain())


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
def test_a_process_without_rows_adds_nothing(weights: str) -> None:
    """As FSDP2 leaves the second of two processes with none of a weight of one row."""
    model = prepared(weights, 2)
    rest = dampening_loss(model)
    model.append(type(model[1]).of(nn.Linear(4, 1), model[1].weight_quantizer))
    model[3].weight = nn.Parameter(torch.empty(0, 4))
    loss = dampening_loss(model)
    loss.backward()
    assert torch.equal(loss, rest)
    assert model[3].weight.grad.shape == (0, 4)
