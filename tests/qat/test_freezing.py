"""Iterative freezing against the algorithm written out; fixed weights stay on their levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from olive.qat import CosineSchedule, IterativeFreezing, OscillationTracker, QATConfig, prepare
from olive.qat.latent import FREE, latent_weights
from tests.qat.subjects import images, tiny_vit, train

MOMENTUM = 0.2


def small(weights: str = "statsq") -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 8))
    return prepare(model, QATConfig(3, None, weights))


def push(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that throws the weights to and fro."""
    weight = model[1].weight
    weight.grad = torch.randn(8, 64) * weight.detach().abs().mean() / 4
    optimizer.step()


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
def test_weights_are_fixed_at_the_rounded_average_of_their_codes(weights: str) -> None:
    model = small(weights)
    latent = latent_weights(model)["1.weight"]
    optimizer = torch.optim.SGD([model[1].weight], lr=1.0)
    tracker = OscillationTracker(model, momentum=MOMENTUM)
    IterativeFreezing(model, optimizer, tracker, 0.3)
    average = latent.buffer("codes").double().clone()
    fixed = torch.full((8, 64), float(FREE), dtype=torch.float64)
    for _ in range(20):
        push(model, optimizer)
        average += MOMENTUM * (latent.buffer("codes") - average)
        chosen = (latent.buffer("frequency") > 0.3) & (fixed == FREE)
        fixed = torch.where(chosen, average.round(), fixed)
        assert bool(((latent.buffer("average") - average).abs() <= 1e-5).all())
        assert torch.equal(latent.buffer("fixed").double(), fixed)
    done = fixed != FREE
    assert 0 < int(done.sum()) < 512
    grid = latent.grid()
    push(model, optimizer)
    levels = latent.weight_quantizer(model[1].weight).detach()
    expected = latent.grid().level(fixed.float())
    assert bool(((levels - expected).abs()[done] <= 1e-6).all())  # each is on its level, wherever that is
    assert grid.step.shape == (8, 1)


def test_fixed_weights_do_not_move_under_any_optimizer() -> None:
    model, data = prepare(tiny_vit(), QATConfig(2, 4, "lsq"), batch=images()), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    tracker = OscillationTracker(model, momentum=MOMENTUM)
    freezing = IterativeFreezing(model, optimizer, tracker, 0.15)
    train(model, optimizer, data, 10)
    latents = latent_weights(model)
    fixed = {name: one.buffer("fixed") != FREE for name, one in latents.items()}
    assert any(bool(one.any()) for one in fixed.values())
    where = {name: one.buffer("fixed").clone() for name, one in latents.items()}
    for _ in range(3):
        train(model, optimizer, data, 1)
        for name, one in latents.items():
            assert torch.equal(one.buffer("codes")[fixed[name]].short(), where[name][fixed[name]])
    freezing.detach()
    train(model, optimizer, data, 8)
    assert any(
        not torch.equal(one.buffer("fixed").float()[fixed[name]], one.grid().code(one.latent())[fixed[name]])
        for name, one in latents.items()
    )


def test_merged_entries_are_fixed_too() -> None:
    model, data = prepare(tiny_vit(), QATConfig(2, 4, qkr=True), batch=images()), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tracker = OscillationTracker(model, momentum=MOMENTUM)
    IterativeFreezing(model, optimizer, tracker, 0.1)
    train(model, optimizer, data, 12)
    merged = next(one for name, one in latent_weights(model).items() if "merged" in name)
    fixed = merged.buffer("fixed") != FREE
    assert fixed.any()
    train(model, optimizer, data, 1)
    assert torch.equal(merged.buffer("codes")[fixed].short(), merged.buffer("fixed")[fixed])


def test_a_schedule_says_when() -> None:
    model = small()
    optimizer = torch.optim.SGD([model[1].weight], lr=1.0)
    asked: list[int] = []

    def schedule(step: int) -> float | None:
        asked.append(step)
        return None if step < 6 else 0.1

    tracker = OscillationTracker(model, momentum=MOMENTUM)
    freezing = IterativeFreezing(model, optimizer, tracker, schedule)
    fixed = latent_weights(model)["1.weight"].buffer("fixed")
    for _ in range(6):
        push(model, optimizer)
    assert bool((fixed == FREE).all())
    push(model, optimizer)
    assert bool((fixed != FREE).any()) and asked == list(range(7))
    assert freezing.state_dict() == {"step": 7}


def test_a_resumed_run_goes_on_as_it_would_have() -> None:
    steps = [torch.randn(8, 64) / 4 for _ in range(12)]

    def make() -> tuple[nn.Module, torch.optim.Optimizer, IterativeFreezing]:
        torch.manual_seed(3)
        model = small()
        optimizer = torch.optim.SGD([model[1].weight], lr=1.0)
        tracker = OscillationTracker(model, momentum=MOMENTUM)
        return (
            model,
            optimizer,
            IterativeFreezing(model, optimizer, tracker, CosineSchedule(0.3, 0.05, first=2, last=12)),
        )

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, wanted: list[Tensor]) -> None:
        for one in wanted:
            model[1].weight.grad = one * model[1].weight.detach().abs().mean()
            optimizer.step()

    model, optimizer, freezing = make()
    run(model, optimizer, steps[:6])
    state, where = {key: one.clone() for key, one in model.state_dict().items()}, freezing.state_dict()
    run(model, optimizer, steps[6:])
    other, optimizer, freezing = make()
    other.load_state_dict(state)
    freezing.load_state_dict(where)
    run(other, optimizer, steps[6:])
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    assert bool((latent_weights(other)["1.weight"].buffer("fixed") != FREE).any())


@pytest.mark.parametrize("threshold", [0, 1, -0.1, float("nan")])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="threshold: expected between 0 and 1, got"):
        IterativeFreezing(model, optimizer, OscillationTracker(model), threshold)


def test_an_attached_tracker_is_refused() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tracker = OscillationTracker(model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"tracker: expected one that is not attached.*tracker\.detach\(\)"):
        IterativeFreezing(model, optimizer, tracker, 0.1)


def test_float_models_and_other_optimizers_are_refused() -> None:
    model = small()
    tracker = OscillationTracker(model)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got NoneType"):
        IterativeFreezing(model, None, tracker, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="model: expected a prepared model"):
        IterativeFreezing(nn.Linear(2, 2), optimizer, tracker, 0.1)
