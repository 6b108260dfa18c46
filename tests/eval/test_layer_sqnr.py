"""`olive.eval.layer_sqnr`: against NumPy in float64, and what it refuses and leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import olive
import olive.eval.layers
from olive.eval import layer_sqnr
from olive.nn import OVPLinear
from tests import models

Edit = Callable[[Any, Any], None]


def pair(name: str = "llama") -> tuple[Any, Any]:
    reference = models.build(name)
    return olive.quantize(copy.deepcopy(reference)), reference


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two batches of different sizes."""
    first = models.inputs(model)
    return [first, {key: value[:1, :5] for key, value in first.items()}]


def outputs(model: nn.Module, names: list[str], batch: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: found.update(
                {name: output.numpy().astype(np.float64, copy=True)}
            )
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(model: nn.Module, reference: nn.Module, data: list[Any]) -> dict[str, float]:
    names = [name for name, module in model.named_modules() if isinstance(module, OVPLinear)]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for batch in data:
        new, old = (outputs(one, names, batch) for one in (model, reference))
        for name in names:
            signal[name] += (old[name] ** 2).sum()
            noise[name] += ((new[name] - old[name]) ** 2).sum()
    return {name: 10 * math.log10(signal[name] / noise[name]) for name in names}


def hooks_on(*both: nn.Module) -> int:
    return sum(len(module._forward_hooks) for one in both for module in one.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_ratios_are_those_of_numpy(name: str) -> None:
    model, reference = pair(name)
    data = batches(model)
    expected = by_hand(model, reference, data)
    found = layer_sqnr(model, reference, iter(data))
    assert list(found) == list(expected) and len(found) >= 4
    for layer, ratio in found.items():
        # The float32 outputs are the same in both; only the sums run in another order.
        assert abs(ratio - expected[layer]) <= 1e-4
        assert 5 < ratio < 60
    assert hooks_on(model, reference) == 0


def test_chunks_of_values_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    expected = layer_sqnr(model, reference, batches(model))
    monkeypatch.setattr(olive.eval.layers, "_CHUNK_VALUES", 101)
    found = layer_sqnr(model, reference, batches(model))
    assert all(abs(found[name] - ratio) <= 1e-9 for name, ratio in expected.items())


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_batches_come_in_many_forms(form: Callable[[Tensor], Any]) -> None:
    reference = models.plain()
    model = olive.quantize(copy.deepcopy(reference))
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    assert layer_sqnr(model, reference, [form(x)]) == layer_sqnr(model, reference, [x])


def test_outputs_written_over_later_are_compared_as_they_were() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Linear(32, 8)).eval()
    model = olive.quantize(copy.deepcopy(reference))
    data = [torch.randn(16, 64)]
    expected, found = by_hand(model, reference, data), layer_sqnr(model, reference, data)
    assert all(abs(found[name] - expected[name]) <= 1e-4 for name in expected)


def test_a_layer_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.layer(x)
            return self.layer(first)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    reference = Twice().eval()
    model = olive.quantize(copy.deepcopy(reference))
    x = torch.randn(8, 64)
    with torch.no_grad():
        one, two = reference.layer(x), reference(x)
        signal = one.double().square().sum() + two.double().square().sum()
        noise = (model.layer(x) - one).double().square().sum() + (model(x) - two).double().square().sum()
    found = layer_sqnr(model, reference, [x])
    assert abs(found["layer"] - 10 * math.log10(signal / noise)) <= 1e-4


def test_exact_and_lost_layers() -> None:
    model, reference = pair()
    x = batches(model)
    assert set(layer_sqnr(model, copy.deepcopy(model), x).values()) == {math.inf}
    with torch.no_grad():
        reference.model.layers[0].mlp.down_proj.weight.zero_()
    assert layer_sqnr(model, reference, x)["model.layers.0.mlp.down_proj"] == -math.inf


def test_layers_that_nothing_reaches_are_missing() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) if len(x) else x  # type: ignore[no-any-return]

    reference = Parts().eval()
    model = olive.quantize(copy.deepcopy(reference))
    assert list(layer_sqnr(model, reference, [torch.randn(4, 64)])) == ["used"]
    with pytest.raises(
        ValueError, match="batches: expected them to reach a quantized layer, got none that does"
    ):
        layer_sqnr(model, reference, [torch.randn(0, 64)])
    with pytest.raises(ValueError, match="batches: expected them to reach a quantized layer"):
        layer_sqnr(olive.quantize(Choosing()), Choosing(), [torch.randn(0, 64)])


def test_experts_are_left_out() -> None:
    model, reference = pair("mixtral")
    found = layer_sqnr(model, reference, batches(model))
    assert found and all("attn" in name for name in found)


def test_outputs_of_one_batch_of_one_model_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    comparer_type, most = olive.eval.layers._Comparer, []

    class Watched(comparer_type):  # type: ignore[valid-type,misc]
        def end_batch(self) -> None:
            most.append(sum(map(len, self._kept.values())))
            super().end_batch()

        def comparing(self, name: str) -> Any:
            hook = super().comparing(name)

            def watching(*args: Any) -> None:
                most.append(sum(map(len, self._kept.values())))
                hook(*args)

            return watching

    monkeypatch.setattr(olive.eval.layers, "_Comparer", Watched)
    layers = len(layer_sqnr(model, reference, batches(model) * 2))
    assert most == [*range(layers, -1, -1)] * 4


def test_hooks_and_flags_are_as_before_after_an_error() -> None:
    model, reference = pair()
    model.train()
    model.model.layers[0].eval()
    reference.train().lm_head.eval()
    flags = [[module.training for module in one.modules()] for one in (model, reference)]
    for wrong in (torch.zeros(1), {"input_ids": "text"}):
        with pytest.raises(Exception):  # noqa: B017  # whatever the model makes of it
            layer_sqnr(model, reference, [*batches(model), wrong])

    def interrupted() -> Any:
        yield batches(model)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_sqnr(model, reference, interrupted())
    layer_sqnr(model, reference, batches(model))
    assert hooks_on(model, reference) == 0
    assert [[module.training for module in one.modules()] for one in (model, reference)] == flags
    assert all(value.grad is None for one in (model, reference) for value in one.parameters())


def _nan(one: Any) -> None:
    with torch.no_grad():
        one.model.layers[0].input_layernorm.weight[0] = math.nan


@pytest.mark.parametrize("which", ["model", "reference"])
def test_nan_is_an_error_that_names_model_and_layer(which: str) -> None:
    model, reference = pair()
    _nan({"model": model, "reference": reference}[which])
    message = f"^{which}: expected finite outputs of model.layers.0.self_attn.q_proj, got NaN or Inf"
    with pytest.raises(ValueError, match=message):
        layer_sqnr(model, reference, batches(model))
    assert hooks_on(model, reference) == 0


class Choosing(nn.Module):
    """Runs a layer so often, on so many rows."""

    def __init__(self, times: int = 1, rows: int = 4) -> None:
        super().__init__()
        self.layer, self.times, self.rows = nn.Linear(64, 32), times, rows

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            self.layer(x[: self.rows])
        return x


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"times": 2}, "it runs more often"),
        ({"times": 0}, "it runs less often"),
        ({"rows": 3}, r"it gives \[3, 32\], not \[4, 32\]"),
    ],
)
def test_models_that_run_differently_cannot_be_compared(options: dict[str, int], how: str) -> None:
    model, reference = olive.quantize(Choosing(**options)), Choosing()
    with pytest.raises(
        ValueError, match=f"model: expected layer to run as in the reference, but {how}; layers"
    ):
        layer_sqnr(model, reference, [torch.randn(4, 64)])


def test_other_outputs_than_tensors_are_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    reference = models.plain()
    model = olive.quantize(copy.deepcopy(reference))
    reference[0] = Pair()
    with pytest.raises(TypeError, match="reference: expected 0 to return a tensor, got tuple"):
        layer_sqnr(model, reference, [torch.randn(4, 96)])


def test_bad_arguments_are_named() -> None:
    model, reference = pair()
    x = batches(model)
    cases: list[tuple[tuple[Any, Any, Any], type[Exception], str]] = [
        ((len, reference, x), TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
        ((model, None, x), TypeError, "reference: expected a torch.nn.Module, got NoneType"),
        ((model, model, x), ValueError, "reference: expected the model's original, got the model itself"),
        ((reference, model, x), ValueError, "model: expected quantized linear layers, got none in Llama"),
        ((model, models.plain(), x), ValueError, "reference: expected a layer called model.layers.0"),
        ((model, reference, x[0]), TypeError, "batches: expected an iterable .* got a single dict; put"),
        ((model, reference, x[0]["input_ids"]), TypeError, "batches: .* got a single Tensor; put it in a"),
        ((model, reference, 3), TypeError, "batches: expected an iterable of batches, got int"),
        ((model, reference, []), ValueError, "batches: expected at least one, got none"),
        ((model, reference, [*x, "a text"]), TypeError, r"batches\[2\]: expected a mapping, .*, got str"),
    ]  # fmt: skip
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            layer_sqnr(*arguments)
    assert hooks_on(model, reference) == 0


def test_eight_bits_are_cleaner_than_four() -> None:
    reference = models.build("llama")
    data = batches(reference)
    four, eight = (
        layer_sqnr(olive.quantize(copy.deepcopy(reference), olive.QuantConfig(bits=bits)), reference, data)
        for bits in (4, 8)
    )
    assert four.keys() == eight.keys()
    assert all(10 < four[name] < eight[name] - 10 for name in four)
