"""Trackers of oscillations against the algorithm written out weight by weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from olive.qat import OscillationTracker, QATConfig, prepare
from olive.qat.latent import LatentWeight, latent_weights
from olive.qat.layers import QATConv1D
from tests import models
from tests.qat.subjects import images, tiny_vit, train

MOMENTUM = 0.2


class Literal:
    """Algorithm 1 of arXiv:2203.11086 without freezing, in Python numbers."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes
        self.direction = [0] * len(codes)
        self.frequency = [0.0] * len(codes)

    def look(self, codes: list[int]) -> None:
        for place, code in enumerate(codes):
            change = code - self.codes[place]
            oscillated = 0.0
            if change != 0:
                sign = 1 if change > 0 else -1
                if self.direction[place] == -sign:
                    oscillated = 1.0
                self.direction[place] = sign
                self.codes[place] = code
            self.frequency[place] = MOMENTUM * oscillated + (1 - MOMENTUM) * self.frequency[place]


def literal_codes(latent: LatentWeight) -> list[int]:
    """Codes from the levels that the forward pass gives: the definition of neither grid is used."""
    weight = latent.latent().float()
    levels = latent.weight_quantizer(latent.latent()).float().flatten(1)
    grid = latent.grid()
    step = grid.step
    if step.shape[1] > 1:
        step = step.repeat_interleave(-(-levels.shape[1] // step.shape[1]), 1)[:, : levels.shape[1]]
    codes = (levels / step - (0.5 - grid.offset)).round()
    assert weight.numel() == codes.numel()
    return [int(one) for one in codes.flatten().tolist()]


def three(group_size: int = -1, weights: str = "statsq", bits: int = 3) -> nn.Module:
    model = nn.Sequential(nn.Linear(24, 12), nn.Conv2d(2, 4, 3), nn.Linear(12, 6), nn.Linear(6, 2))
    return prepare(model, QATConfig(bits, None, weights, group_size=group_size))


def conv1d() -> nn.Module:
    return prepare(models.gpt2(), QATConfig(2))


def merged() -> nn.Module:
    return prepare(tiny_vit(), QATConfig(2, 4, qkr=True), batch=images())


CASES: dict[str, Callable[[], nn.Module]] = {
    "statsq": three,
    "groups": lambda: three(10),
    "groups, the last one short": lambda: three(22),
    "lsq": lambda: three(weights="lsq"),
    "one bit": lambda: three(bits=1),
    "conv1d": conv1d,
    "merged": merged,
}


def walk_randomly(latent: LatentWeight) -> None:
    """To and fro by up to a third of a step."""
    with torch.no_grad():
        parameters = [one for one in latent.parameters(recurse=False) if one.dim() > 1]
        for one in parameters or [one.weight for one in latent._projections]:
            one.add_(one.abs().mean() * torch.randn_like(one) / 3)


@pytest.mark.parametrize("name", list(CASES))
def test_frequencies_are_those_of_the_algorithm(name: str) -> None:
    model = CASES[name]()
    tracker = OscillationTracker(model, momentum=MOMENTUM)
    latents = dict(list(latent_weights(model).items())[:3])
    if name == "conv1d":
        latents = {key: one for key, one in latents.items() if key.endswith("attn.c_proj.weight")}
        assert latents and all(isinstance(one, QATConv1D) for one in latents.values())
    if name == "merged":
        latents = {key: one for key, one in latents.items() if key.endswith("merged_weight.weight")}
        assert latents
    oracles = {key: Literal(literal_codes(one)) for key, one in latents.items()}
    for _ in range(12):
        for key, latent in latents.items():
            walk_randomly(latent)
            oracles[key].look(literal_codes(latent))
        tracker.update()
    for key, latent in latents.items():
        assert latent.buffer("codes").flatten().tolist() == oracles[key].codes
        assert latent.buffer("direction").flatten().tolist() == oracles[key].direction
        expected = torch.tensor(oracles[key].frequency)
        assert expected.max() > 0.1
        # float32 against float64 sums of twelve terms below one
        assert bool(((latent.buffer("frequency").flatten() - expected).abs() <= 1e-6).all())


@pytest.mark.parametrize("name", ["statsq", "groups", "lsq", "conv1d"])
def test_shares_are_counted(name: str) -> None:
    model = CASES[name]()
    tracker = OscillationTracker(model, momentum=MOMENTUM, threshold=0.1, boundary_range=0.1)
    latents = latent_weights(model)
    for _ in range(6):
        for latent in latents.values():
            walk_randomly(latent)
        tracker.update()
    layers = tracker.layers()
    assert list(layers) == list(latents)
    oscillating = near = total = 0
    for key, latent in latents.items():
        one, size = layers[key], latent.latent().numel()
        assert one.values == size
        often = int((latent.buffer("frequency") > 0.1).sum())
        inside = int((latent.weight_quantizer.margin(latent.latent()) <= 0.1).sum())
        assert one.oscillating == often / size and one.at_boundary == inside / size
        oscillating, near, total = oscillating + often, near + inside, total + size
    shares = tracker.shares()
    assert math.isclose(shares["oscillating"], oscillating / total) and oscillating > 0
    assert math.isclose(shares["at_boundary"], near / total) and near > 0


def test_shares_follow_weights_that_others_change() -> None:
    model = three()
    tracker = OscillationTracker(model, boundary_range=0.2)
    before = tracker.layers()["2.weight"].at_boundary
    with torch.no_grad():
        model[2].weight.fill_(1)  # on a threshold
    got = tracker.layers()["2.weight"].at_boundary
    assert before == pytest.approx(0.35, abs=0.2) and got == 1


@pytest.mark.parametrize("name", ["statsq", "groups", "lsq"])
def test_histogram_counts_distances(name: str) -> None:
    model = CASES[name]()
    found = OscillationTracker(model).histogram(16)
    assert found.shape == (16,) and found.dtype == torch.float64
    expected = torch.zeros(16, dtype=torch.int64)
    for latent in latent_weights(model).values():
        grid = latent.grid()
        for value in grid.from_threshold(latent.latent()).flatten().tolist():
            if -0.5 <= value <= 0.5:
                expected[min(15, int((value + 0.5) * 16))] += 1
    assert found.tolist() == expected.tolist()
    margins = torch.cat(
        [one.weight_quantizer.margin(one.latent()).flatten() for one in latent_weights(model).values()]
    )
    assert abs(int(found.sum()) - int((margins <= 0.5).sum())) <= 2  # those at half a step, by rounding


def test_nan_is_named() -> None:
    model = three()
    tracker = OscillationTracker(model)
    with torch.no_grad():
        model[2].weight[1, 3] = float("nan")
        model[2].weight[2, 3] = float("inf")
    tracker.update()
    with pytest.raises(ValueError, match=r"2\.weight: expected finite latent weights, got 2 NaN or Inf"):
        tracker.shares()
    assert bool(tracker.histogram().isfinite().all())


def test_what_is_recorded_is_saved_and_resumed() -> None:
    data = images()
    batches = [images(seed) for seed in range(6)]

    def make() -> tuple[nn.Module, OscillationTracker]:
        model = prepare(tiny_vit(), QATConfig(2, 4, qkr=True), batch=data)
        return model, OscillationTracker(model, momentum=MOMENTUM)

    def run(model: nn.Module, tracker: OscillationTracker, steps: range) -> None:
        tracker.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.5))
        for step in steps:
            train(model, optimizer, batches[step], 1)
        tracker.detach()

    model, tracker = make()
    names = {
        f"{key.removesuffix('weight')}{one}"
        for key in latent_weights(model)
        for one in ("codes", "direction", "frequency")
    }
    assert names <= set(model.state_dict())
    run(model, tracker, range(3))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other, resumed = make()
    other.load_state_dict(state)
    assert resumed.layers() == tracker.layers()
    run(model, tracker, range(3, 6))
    run(other, resumed, range(3, 6))
    assert resumed.layers() == tracker.layers() and tracker.shares()["oscillating"] > 0
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_two_trackers_of_one_model_share_what_is_recorded() -> None:
    model = three()
    first = OscillationTracker(model)
    buffer = latent_weights(model)["2.weight"].buffer("frequency")
    buffer.fill_(0.5)
    second = OscillationTracker(model)
    assert first.shares() == second.shares() and second.shares()["oscillating"] > 0


def test_first_and_last_layers_are_not_followed() -> None:
    assert list(OscillationTracker(three()).layers()) == ["1.weight", "2.weight"]


def test_attaching_looks_after_each_step_once() -> None:
    model, data = prepare(tiny_vit(), QATConfig(2), batch=images()), images()
    calls: list[int] = []
    tracker = OscillationTracker(model)
    tracker.update = lambda: calls.append(1)  # type: ignore[method-assign]
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    tracker.attach(first)
    train(model, first, data, 2)
    tracker.attach(second)
    train(model, first, data, 2)
    train(model, second, data, 1)
    tracker.detach()
    train(model, second, data, 1)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"momentum": 0}, "momentum: expected between 0 and 1, got 0"),
        ({"momentum": 1.0}, r"momentum: expected between 0 and 1, got 1\.0"),
        ({"threshold": float("nan")}, "threshold: expected between 0 and 1, got nan"),
        ({"boundary_range": 0.6}, r"boundary_range: expected above 0 and up to 0\.5 steps, got 0\.6"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OscillationTracker(three(), **values)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a prepared model"):
        OscillationTracker(models.plain())


def test_distances_are_signed() -> None:
    model = three(bits=2)
    with torch.no_grad():  # mean magnitude 1/2, so thresholds are at -1/2, 0 and 1/2
        model[2].weight.fill_(0.5)
        model[2].weight[:, 0] = 0.4
        model[2].weight[:, 1] = 0.6
    found: Tensor = model[2].grid().from_threshold(model[2].weight.detach())
    assert torch.allclose(found[:, :2], torch.tensor([-0.2, 0.2]).expand(6, 2), atol=1e-6)


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
def test_a_process_without_rows_counts_none(weights: str) -> None:
    """As FSDP2 leaves the second of two processes with none of a weight of one row."""
    model = three(weights=weights)
    expected = OscillationTracker(model).histogram(8)
    model.append(type(model[2]).of(nn.Linear(4, 1), model[2].weight_quantizer))
    model[4].weight = nn.Parameter(torch.empty(0, 4))
    tracker = OscillationTracker(model)
    tracker.update()
    assert torch.equal(tracker.histogram(8), expected)


def test_a_weight_of_another_shape_than_what_was_recorded_is_refused() -> None:
    """As it is when a model was sharded after its tracker was made, which was not attached since."""
    model = three()
    tracker = OscillationTracker(model)
    model[2].weight = nn.Parameter(model[2].weight.detach()[:3])
    with pytest.raises(ValueError, match=r"codes: expected .*attach trackers after fully_shard"):
        tracker.update()
