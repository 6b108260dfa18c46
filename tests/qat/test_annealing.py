"""Annealing: frozen weights keep their bits whatever the optimizer does; the others train on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olive.qat import Annealing, OscillationTracker, QATConfig, anneal, prepare
from olive.qat.latent import LatentWeight, latent_weights
from olive.qat.layers import QATLinear
from olive.qat.steps import steps_of
from tests import models
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train

RANGE = 0.05  # wide, so that tiny models have weights inside
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
}
ANY = OPTIMIZERS["adamw"]


def vit(config: QATConfig | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    model, data = tiny_vit(), images()
    return prepare(model, config or QATConfig(2, 4), batch=data), data


class Watch:
    """Checks each step of an optimizer: it goes around it before and after everything else."""

    def __init__(self, model: nn.Module, boundary: float = RANGE) -> None:
        self.latents, self.boundary = latent_weights(model), boundary
        self.moved = self.frozen = self.free = 0

    def before(self) -> None:
        self.held = {name: (self._frozen(one), one.latent().clone()) for name, one in self.latents.items()}

    def _frozen(self, one: LatentWeight) -> Tensor:
        margin = one.weight_quantizer.margin(one.latent())
        return ~(margin <= self.boundary)

    def after(self) -> None:
        for name, (frozen, before) in self.held.items():
            latent = self.latents[name].latent()
            assert torch.equal(latent[frozen], before[frozen]), name
            self.moved += int((latent[~frozen] != before[~frozen]).sum())
            self.frozen += int(frozen.sum())
            self.free += int((~frozen).sum())

    def passed(self) -> bool:
        """Most are frozen, some are free, and of these most have moved."""
        return self.frozen > self.free > 0 and self.moved > 0.5 * self.free


def watched(model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Tensor], steps: int) -> Watch:
    watch = Watch(model)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**data).loss.backward()
        watch.before()
        optimizer.step()
        watch.after()
    return watch


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_frozen_weights_keep_their_bits(name: str, weights: str) -> None:
    model, data = vit(QATConfig(2, 4, weights))
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, data, 2)  # moments that go on pushing
    anneal(model, optimizer, RANGE)
    assert watched(model, optimizer, data, 4).passed()


def test_frozen_weights_keep_their_bits_in_conv1d() -> None:
    model = models.gpt2()
    data = tokens()
    prepare(model, QATConfig(2, 4), batch=data)
    optimizer = ANY(model.parameters())
    train(model, optimizer, data, 2)
    anneal(model, optimizer, RANGE)
    assert watched(model, optimizer, data, 3).passed()


def test_frozen_entries_of_merged_queries_and_keys_keep_their_bits() -> None:
    model, data = vit(QATConfig(2, 4, qkr=True))
    optimizer = ANY(model.parameters())
    train(model, optimizer, data, 2)
    anneal(model, optimizer, RANGE)
    watch = Watch(model)
    assert any(name.endswith("merged_weight.weight") for name in watch.latents)
    query = model.vit.layers[0].attention.q_proj.weight
    before = query.detach().clone()
    first = watched(model, optimizer, data, 4)
    assert first.passed()
    assert not torch.equal(query, before)  # they themselves are never frozen


def test_gradient_scaler_passes_through() -> None:
    model, data = vit()
    optimizer = ANY(model.parameters())
    anneal(model, optimizer, RANGE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    watch = Watch(model)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(**data).loss).backward()
        if step == 2:  # a step that overflows is left out
            model.classifier.weight.grad.fill_(float("inf"))
            everything = [one.detach().clone() for one in model.parameters()]
        watch.before()
        scaler.step(optimizer)
        scaler.update()
        watch.after()
        if step == 2:
            assert all(torch.equal(*pair) for pair in zip(model.parameters(), everything, strict=True))
    assert watch.frozen > watch.free > 0 and watch.moved > 0


def test_gradients_accumulate_in_between() -> None:
    model, data = vit()
    optimizer = ANY(model.parameters())
    anneal(model, optimizer, RANGE)
    watch = Watch(model)
    for _ in range(3):
        optimizer.zero_grad()
        for part in range(2):
            (model(**{key: value[3 * part :][:3] for key, value in data.items()}).loss / 2).backward()
        watch.before()
        optimizer.step()
        watch.after()
    assert watch.passed()


def test_closures_pass_through() -> None:
    model, data = vit()
    optimizer = ANY(model.parameters())
    anneal(model, optimizer, RANGE)
    watch = Watch(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**data).loss
        loss.backward()
        return loss

    watch.before()
    optimizer.step(closure)
    watch.after()
    assert watch.moved


def test_gradients_of_frozen_weights_are_zero_and_no_others() -> None:
    model, data = vit()
    seen: dict[str, Tensor] = {}

    class Probe(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update({name: one.weight.grad.clone() for name, one in latents.items()})

    latents = latent_weights(model)
    optimizer = Probe(model.parameters(), lr=0.1)
    anneal(model, optimizer, RANGE)
    model(**data).loss.backward()
    before = {name: one.weight.grad.clone() for name, one in latents.items()}
    others = model.classifier.weight.grad.clone()
    optimizer.step()
    for name, latent in latents.items():
        free = latent.weight_quantizer.margin(latent.latent()) <= RANGE
        assert torch.equal(seen[name], before[name] * free)
    assert torch.equal(model.classifier.weight.grad, others)


def test_everything_else_trains_on() -> None:
    model, data = vit(QATConfig(2, 4, "lsq", activation_offsets=True))
    latent = {one.weight for one in latent_weights(model).values()}
    others = {name: one for name, one in model.named_parameters() if one not in latent}
    before = {name: one.detach().clone() for name, one in others.items()}
    optimizer = ANY(model.parameters())
    anneal(model, optimizer)
    train(model, optimizer, data, 2)
    still = {name for name, one in others.items() if torch.equal(one, before[name])}
    assert all("k_proj" in name for name in still)  # softmax does not see what is the same for all keys
    assert any("weight_quantizer.scale" not in name for name in others)


def test_trackers_see_weights_after_they_are_put_back() -> None:
    """Whichever was attached first."""
    recorded = []
    for first in ("tracker", "annealing"):
        model, data = vit()
        optimizer = ANY(model.parameters())
        tracker = OscillationTracker(model)
        for what in (first, "annealing" if first == "tracker" else "tracker"):
            if what == "tracker":
                tracker.attach(optimizer)
            else:
                anneal(model, optimizer, RANGE)
        train(model, optimizer, data, 3)
        for latent in latent_weights(model).values():
            code = latent.grid().code(latent.latent()).view(latent.latent().shape)
            near = latent.weight_quantizer.margin(latent.latent()) < 1e-4
            assert bool(((latent.buffer("codes") == code) | near).all())
        recorded.append(model.state_dict())
    assert all(torch.equal(recorded[0][key], recorded[1][key]) for key in recorded[0])


def test_detached_annealing_lets_all_go() -> None:
    model, data = vit()
    optimizer = ANY(model.parameters())
    annealing = anneal(model, optimizer, RANGE)
    train(model, optimizer, data, 2)
    annealing.detach()
    annealing.detach()
    phases = steps_of(optimizer)
    assert phases.before == phases.restore == phases.observe == []
    layer = model.vit.layers[0].mlp.fc1
    before = layer.weight.detach().clone()
    train(model, optimizer, data, 1)
    assert bool((layer.weight != before).all())


def test_weights_leave_the_range_and_stop() -> None:
    """One weight next to a threshold is pushed away from it until it is out of the range."""
    model = prepare(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 8)), QATConfig(2))
    layer = model[1]
    with torch.no_grad():  # all others lie 0.15 steps away from a threshold
        layer.weight[:, ::2] = 0.3 * 1.15
        layer.weight[:, 1::2] = 0.3 * 0.85
        layer.weight[0, 0] = 0.001
    others = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    anneal(model, optimizer, 0.1)
    places = []
    for _ in range(60):
        layer.weight.grad = torch.full_like(layer.weight, -0.002)
        optimizer.step()
        places.append(float(layer.weight.detach()[0, 0]))
    assert places[0] < places[5] < places[-1] == places[-2]
    assert torch.equal(layer.weight.detach().flatten()[1:], others.flatten()[1:])


def test_nan_is_never_inside_and_thaws_nobody_else() -> None:
    model, _ = vit()
    optimizer = ANY(model.parameters())
    anneal(model, optimizer, RANGE)
    layer = model.vit.layers[0].mlp.fc1
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    inside = layer.inside(RANGE)
    assert not inside[3, 4]
    assert inside.any()
    before, frozen = layer.weight.detach().clone(), ~inside
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(layer.weight[frozen].nan_to_num(7), before[frozen].nan_to_num(7))
    assert bool((layer.weight[~frozen] != before[~frozen]).all())


def test_a_nan_gradient_reaches_no_frozen_weight() -> None:
    model, _ = vit()
    optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
    anneal(model, optimizer, RANGE)
    layer = model.vit.layers[0].mlp.fc1
    frozen = ~layer.inside(RANGE)
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    optimizer.step()
    assert bool(layer.weight[frozen].isfinite().all())


def test_learned_scales_count_in_what_is_inside() -> None:
    """The weights stay, their grid moves."""
    model, _ = vit(QATConfig(3, 4, "lsq"))
    layer = model.vit.layers[0].mlp.fc1
    assert isinstance(layer, QATLinear)
    before = layer.inside(RANGE).clone()
    with torch.no_grad():
        layer.weight_quantizer.scale.mul_(1.3)
    expected = layer.weight_quantizer.margin(layer.weight.detach()) <= RANGE
    assert torch.equal(layer.inside(RANGE), expected)
    assert not torch.equal(expected, before)


def test_state_dict_is_checked_when_a_run_is_resumed() -> None:
    model, _ = vit()
    optimizer = ANY(model.parameters())
    annealing = anneal(model, optimizer, 0.02)
    assert isinstance(annealing, Annealing) and annealing.state_dict() == {"boundary_range": 0.02}
    annealing.load_state_dict({"boundary_range": 0.02})
    with pytest.raises(ValueError, match=r"boundary_range: expected 0\.01, with which .*, got 0\.02"):
        annealing.load_state_dict({"boundary_range": 0.01})


@pytest.mark.parametrize("boundary", [0, -0.1, 0.51, float("nan")])
def test_a_range_out_of_bounds_is_refused(boundary: float) -> None:
    model, _ = vit()
    optimizer = ANY(model.parameters())
    with pytest.raises(ValueError, match=r"boundary_range: expected above 0 and up to 0\.5 steps"):
        anneal(model, optimizer, boundary)
    assert steps_of(optimizer).before == []


def test_other_models_and_optimizers_are_refused() -> None:
    model = tiny_llama()
    optimizer = ANY(model.parameters())
    with pytest.raises(ValueError, match=r"expected a prepared model, got none of its layers; call olive\."):
        anneal(model, optimizer)
    prepare(model, QATConfig(2))
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got str"):
        anneal(model, "adamw")


def test_an_optimizer_wrapped_by_accelerate_is_found() -> None:
    from accelerate import Accelerator

    model, data = vit()
    inner = ANY(model.parameters())
    anneal(model, Accelerator(cpu=True).prepare(inner), RANGE)
    assert watched(model, inner, data, 2).passed()


def passing(model: nn.Module) -> list[str]:
    """What layers remember beside parameters and buffers."""
    return [
        name for one in latent_weights(model).values() for name in vars(one) if name in ("_seen", "_held")
    ]


@pytest.mark.parametrize("qkr", [False, True])
def test_no_copy_of_the_weights_outlives_annealing(qkr: bool) -> None:
    model, data = vit(QATConfig(2, 4, qkr=qkr))
    tracker = OscillationTracker(model, optimizer=(optimizer := ANY(model.parameters())))
    annealing = anneal(model, optimizer, RANGE)
    train(model, optimizer, data, 2)
    assert {"_seen", "_held"} == set(passing(model))
    assert passing(copy.deepcopy(model)) == []
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert passing(torch.load(stream, weights_only=False)) == []
    annealing.detach()
    tracker.detach()
    annealing.detach()
    assert passing(model) == []


def test_what_is_detached_leaves_another_annealing_at_work() -> None:
    model, data = vit()
    optimizer = ANY(model.parameters())
    first, second = anneal(model, optimizer, RANGE), anneal(model, optimizer, RANGE)
    train(model, optimizer, data, 1)
    first.detach()
    assert watched(model, optimizer, data, 2).passed()
    second.detach()


def test_frozen_entries_of_merged_matrices_stay_after_detaching() -> None:
    model, data = vit(QATConfig(2, 4, qkr=True))
    optimizer = ANY(model.parameters())
    annealing = anneal(model, optimizer, RANGE)
    train(model, optimizer, data, 2)
    annealing.detach()
    merged = {name: one for name, one in latent_weights(model).items() if "merged" in name}
    held = {name: (one.get_buffer("frozen").clone(), one.latent()) for name, one in merged.items()}
    train(model, optimizer, data, 1)
    for name, (frozen, before) in held.items():
        assert bool(frozen.any()) and torch.equal(merged[name].latent()[frozen], before[frozen])
