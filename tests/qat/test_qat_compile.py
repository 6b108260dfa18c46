"""torch.compile of a model in training: one graph once scales are set, and the eager loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from olive.qat import OscillationTracker, QATConfig, anneal, prepare
from olive.qat.preparation import quantizers
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train

Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], QATConfig]
PER_TOKEN = QATConfig(2, 4, qkr=True, activation_granularity="per_token", activation_offsets=True)
CASES: dict[str, Case] = {
    "vit, qkr": (tiny_vit, images, QATConfig(2, 4, qkr=True)),
    "vit, qkr per token": (tiny_vit, images, PER_TOKEN),
    "llama": (tiny_llama, tokens, QATConfig(3, 8, "lsq")),
    "llama, attention": (tiny_llama, tokens, QATConfig(2, 4, group_size=12, quantize_attention=True)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"),
    # torch's own: its compiler looks at `grad` of what goes into a graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def gradients(model: nn.Module, called: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = called(**data).loss
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **found}


def prepared(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    make, batch, config = CASES[name]
    model, data = make(), batch()
    prepare(model, config, batch=data)
    if name.startswith("llama"):
        model.config.use_cache = False
    return model.train(), data


@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_gradients_are_the_eager_ones(name: str) -> None:
    torch._dynamo.reset()
    model, data = prepared(name)
    expected = gradients(model, model, data)
    got = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), data)
    assert got.keys() == expected.keys()
    for key, one in expected.items():
        # The same operators; sums of gradients may be taken in another order.
        assert bool(((got[key] - one).abs() <= 1e-6 + 1e-5 * one.abs().max()).all()), key


@pytest.mark.slow
def test_inductor_trains_as_eager_does() -> None:
    """One attention: it is compiled kernel by kernel, which takes seconds each."""
    torch._dynamo.reset()
    model, data = prepared("vit, qkr")
    expected = gradients(model, model, data)
    model.vit.layers[0].attention.compile(fullgraph=True)
    got = gradients(model, model, data)
    assert got.keys() == expected.keys()
    # Fused operations round otherwise, by which a value on a threshold may turn to its next level.
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3)
    for key, one in expected.items():
        assert (got[key] - one).square().sum() <= 0.01 * one.square().sum() + 1e-9, key


def test_annealing_and_tracking_act_on_a_compiled_model() -> None:
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        model, data = prepared("vit, qkr")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = OscillationTracker(model, momentum=0.2, optimizer=optimizer)
        anneal(model, optimizer, 0.1)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        train(called, optimizer, data, 3)
        states.append((model.state_dict(), tracker.shares()))
    first, second = states[0][0], states[1][0]
    assert first.keys() == second.keys()
    assert all(bool(((one.float() - second[key].float()).abs() <= 1e-5).all()) for key, one in first.items())
    assert states[0][1] == pytest.approx(states[1][1])


def test_scales_are_set_while_compiling() -> None:
    """Without a batch the first call sets them, outside of the graph."""
    torch._dynamo.reset()
    model = prepare(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), QATConfig(2, 4))
    other, input = copy.deepcopy(model), torch.randn(5, 8)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input)
    assert torch.equal(compiled(input), other(input))
    for one, expected in zip(quantizers(model).values(), quantizers(other).values(), strict=True):
        assert torch.equal(one.scale, expected.scale)
