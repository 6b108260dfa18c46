"""Norms that must be left out, one model for each reason, and those that may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olive.eval import inject_outliers

WIDTH = 8


class Model(nn.Module):
    """A norm that can be used, `good`, and then what `use` makes of another one, `bad`."""

    def __init__(self, use: Callable[[Model, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.good, self.bad = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for norm in (self.good, self.bad):
            nn.init.normal_(norm.weight, 1.0, 0.1)
            nn.init.normal_(norm.bias)
        for name, module in modules.items():
            setattr(self, name, module)
        self.use = use
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.first(self.good(x)))


class Offset(nn.Module):
    """RMS norm with a gain of its own making."""

    def __init__(self, gain: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(WIDTH)), gain

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (WIDTH,)) * self.gain(self.weight)


class Router(nn.Module):
    """Multiplies by its own matrix, in the input's type or another, and does something else too."""

    def __init__(self, then: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.weight, self.then = nn.Parameter(torch.randn(5, WIDTH)), then

    def forward(self, x: Tensor) -> Tensor:
        scores = nn.functional.linear(x.reshape(-1, WIDTH).double(), self.weight.double()).float()
        return scores if self.then is None else scores + self.then(x.reshape(-1, WIDTH))


def reuse_weight(model: Model, x: Tensor) -> Tensor:
    return model.second(model.bad(x)) + nn.functional.linear(x, model.second.weight)


def read_memory(model: Model, x: Tensor) -> Tensor:
    normed = model.bad(x)
    return model.second(normed) + torch.from_numpy(normed.numpy().copy())


def tied_norms() -> Model:
    model = Model(lambda m, x: m.second(m.bad(x)), other=nn.LayerNorm(WIDTH))
    model.other.weight = model.bad.weight  # type: ignore[union-attr,assignment]
    return model


UNSEEN = "the model's output changes: it is read in a way that cannot be seen, or its dtype overflows"
CASES: dict[str, tuple[Callable[[], Model], str]] = {
    "residual": (
        lambda: Model(lambda m, x: m.second(y := m.bad(x)) + y),
        "read by aten.add in the model",
    ),
    "changed in place": (
        lambda: Model(lambda m, x: m.second(m.bad(x).mul_(2.0))),
        "read by aten.mul_ in the model",
    ),
    "another module": (
        lambda: Model(lambda m, x: m.second(y := m.bad(x)) + m.act(y), act=nn.GELU()),
        "read by aten.gelu in act",
    ),
    "returned": (
        lambda: Model(lambda m, x: {"hidden": (y := m.bad(x))[:, -1], "out": m.second(y)}),  # type: ignore[arg-type,return-value]
        "its output is an output of the model",
    ),
    "reader of two": (
        lambda: Model(lambda m, x: m.second(m.bad(x)) + m.second(x)),
        "read by second, which reads other tensors as well",
    ),
    "other shape": (
        lambda: Model(
            lambda m, x: m.wide(m.bad(x).flatten(1)), wide=nn.Linear(3 * WIDTH, WIDTH)
        ),
        "read by wide in another shape",
    ),
    "router that also adds": (
        lambda: Model(lambda m, x: m.router(m.bad(x)), router=Router(lambda x: x[:, :5])),
        "read by aten.add in router",
    ),
    "not run": (lambda: Model(lambda m, x: x), "the sample does not run it"),
    "not read": (lambda: Model(lambda m, x: (m.bad(x), x)[1]), "no linear layer reads its output"),
    "tied norms": (tied_norms, "bad.weight is tied to other.weight"),
    "batch norm": (
        lambda: Model(lambda m, x: m.second(m.bad(x)), bad=nn.BatchNorm1d(3)),
        "its output is not one tensor with a channel for each of its weights",
    ),
    "unknown gain": (
        lambda: Model(lambda m, x: m.second(m.bad(x)), bad=Offset(torch.exp)),
        "its output does not scale with its weight",
    ),
    "weight used twice": (lambda: Model(reuse_weight), UNSEEN),
    "memory": (lambda: Model(read_memory), UNSEEN),
}  # fmt: skip


def sample() -> Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_left_out_with_the_reason(case: str) -> None:
    build, reason = CASES[case]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    injection = inject_outliers(model, sample=sample())
    assert [(norm.name, norm.readers) for norm in injection.norms] == [("good", ("first",))]
    left_out = {other.name: other.reason for other in injection.left_out}
    assert left_out["bad"] == reason
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (key in ("good.weight", "good.bias", "first.weight")), key


USABLE: dict[str, tuple[Callable[[], Model], tuple[str, ...]]] = {
    "gain of one plus weight": (
        lambda: Model(lambda m, x: m.second(m.bad(x)), bad=Offset(lambda weight: 1.0 + weight)),
        ("second",),
    ),
    "no bias": (lambda: Model(lambda m, x: m.second(m.bad(x)), bad=nn.RMSNorm(WIDTH)), ("second",)),
    "views and casts": (
        lambda: Model(lambda m, x: m.second(m.bad(x).view(-1, WIDTH)[1:].double().float().contiguous())),
        ("second",),
    ),
    "called twice": (lambda: Model(lambda m, x: m.second(m.bad(m.second(m.bad(x))))), ("second",)),
    "router": (lambda: Model(lambda m, x: m.router(m.bad(x)), router=Router()), ("router",)),
}


@pytest.mark.parametrize("case", USABLE)
def test_used_with_its_readers(case: str) -> None:
    build, readers = USABLE[case]
    model = build()
    with torch.no_grad():
        before = model(sample())
        injection = inject_outliers(model, sample=sample())
        after = model(sample())
    assert {norm.name: norm.readers for norm in injection.norms} == {"good": ("first",), "bad": readers}
    assert bool(((after - before).abs() <= 1e-5 * before.abs().max()).all())


def test_outputs_that_overflow_are_seen_before_the_model_changes() -> None:
    model = Model(lambda m, x: m.second(m.bad(x))).half()
    with pytest.raises(ValueError, match=r"good: the model's output changes: .* or its dtype overflows"):
        inject_outliers(model, factor=60000.0, sample=sample().half())


def test_models_without_norms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only linear layers read, got none \(it has no norms\)"):
        inject_outliers(nn.Sequential(nn.Linear(WIDTH, 3)), sample=sample())


def test_outputs_without_floats_are_refused() -> None:
    model = Model(lambda m, x: m.second(m.bad(x)).argmax(-1))
    with pytest.raises(ValueError, match="sample: expected float tensors in the model's output, got none"):
        inject_outliers(model, sample=sample())


def test_errors_name_a_few_of_many_norms() -> None:
    norms = [nn.LayerNorm(WIDTH) for _ in range(11)]
    with pytest.raises(ValueError, match=r"7: read by aten.native_layer_norm in 8; and 3 more\)"):
        inject_outliers(nn.Sequential(*norms), sample=sample())
