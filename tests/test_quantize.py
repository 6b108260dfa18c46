"""olive.quantize and olive.dequantize on plain PyTorch models: what changes, what does not, and errors."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import olive
from olive import _progress, quantization
from olive.formats import get_codebook
from olive.nn import OVPLinear
from olive.ptq import parameter
from olive.walk import attached_config
from tests import models


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything by identity: modules, parameters, attributes of the model."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "parameters": [(name, id(value)) for name, value in model.named_parameters(remove_duplicate=False)],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": sorted(vars(model)),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert all(
        torch.equal(after["values"][k].nan_to_num(), v.nan_to_num()) for k, v in before["values"].items()
    )
    for key in ("modules", "parameters", "attributes"):
        assert after[key] == before[key], key


def test_in_place_and_returned() -> None:
    model = models.plain()
    assert olive.quantize(model) is model
    assert isinstance(model[0], OVPLinear) and isinstance(model[3], OVPLinear)
    assert isinstance(model[2], nn.LayerNorm)
    assert model[0].is_packed


@pytest.mark.parametrize("codebook", ["adaptive", "nf4", "int4", "flint4", "learned"])
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_close_to_the_float_model(codebook: str, group_size: int) -> None:
    model = models.plain()
    input = torch.randn(64, 96)
    with torch.no_grad():
        before = model(input)
        olive.quantize(model, olive.QuantConfig(codebook=codebook, group_size=group_size))
        error = (model(input) - before).norm() / before.norm()
    # 4-bit codes of uniform weights lose about 10 % in each of two layers; int4 and per-tensor lose more.
    assert float(error) < 0.25


def test_paper_method() -> None:
    model = models.plain()
    olive.quantize(model, olive.QuantConfig(method="paper", codebook="int4", group_size=-1))
    assert model[0].sqnr_db > 12


def test_same_as_dequantized() -> None:
    model = olive.quantize(models.plain())
    floats = olive.dequantize(copy.deepcopy(model))
    input = torch.randn(7, 96)
    with torch.no_grad():
        difference = (model(input) - floats(input)).abs().max()
        assert bool(difference <= 2e-5 * floats(input).abs().max())


def test_sqnr_is_that_of_the_weight() -> None:
    model = models.plain()
    floats = [model[0].weight.detach().double(), model[3].weight.detach().double()]
    olive.quantize(model)
    for layer, weight in zip((model[0], model[3]), floats, strict=True):
        noise = (weight - layer.dequantize().double()).square().sum()
        assert layer.sqnr_db == pytest.approx(
            float(10 * torch.log10(weight.square().sum() / noise)), abs=1e-4
        )


def test_sqnr_of_weights_that_the_codes_hold_exactly_is_infinite() -> None:
    levels = torch.tensor(get_codebook("adaptive").plain, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight.copy_(levels.repeat(4, 2) * 2.0**-9)
        model[1].weight.zero_()
    olive.quantize(model, olive.QuantConfig(group_size=32))
    assert model[0].sqnr_db == math.inf and model[1].sqnr_db == math.inf


@pytest.mark.parametrize("size", [2.0**-50, 2.0**50])
def test_sqnr_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    weight = torch.randn(8, 64)
    layers = [nn.Linear(64, 8), nn.Linear(64, 8)]
    with torch.no_grad():
        layers[0].weight.copy_(weight)
        layers[1].weight.copy_(weight * size)
    model = olive.quantize(nn.Sequential(*layers))
    assert model[1].sqnr_db == pytest.approx(model[0].sqnr_db, abs=1e-4)  # type: ignore[index]


def test_what_is_kept() -> None:
    model = models.plain()
    model[0].train()
    bias, norm = model[0].bias, model[2]
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda module, args, out: calls.append(1))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append(2), with_kwargs=True)
    olive.quantize(model)
    assert model[0].training and not model[3].training
    assert model[0].bias is bias and bias.requires_grad and model[2] is norm
    assert not any(value.requires_grad for name, value in model[0].named_parameters() if name != "bias")
    model(torch.ones(1, 96))
    assert calls == [2, 1]
    handle.remove()
    model(torch.ones(1, 96))
    assert calls == [2, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_the_inverse(dtype: torch.dtype) -> None:
    class Tagged(nn.Linear):
        tag = "a"

    model = models.plain().to(dtype)
    model[0].__class__ = Tagged
    model[0].note = "kept"  # type: ignore[assignment]
    model[3].weight.requires_grad_(False)
    bias = model[0].bias
    decoded = [layer.dequantize(dtype) for layer in (olive.quantize(model)[0], model[3])]  # type: ignore[index]
    assert attached_config(model) == olive.QuantConfig()
    assert olive.dequantize(model) is model
    assert attached_config(model) is None
    assert type(model[0]) is Tagged and model[0].note == "kept" and type(model[3]) is nn.Linear
    assert (model[0].in_features, model[0].out_features) == (96, 200) and model[0].bias is bias
    assert not model[0].training
    for layer, weight in zip((model[0], model[3]), decoded, strict=True):
        assert layer.weight.dtype == dtype and torch.equal(layer.weight, weight)
    assert model[0].weight.requires_grad and not model[3].weight.requires_grad
    olive.quantize(model)


def test_quantizing_decoded_weights_again_changes_little() -> None:
    model = olive.quantize(models.plain())
    once = model[0].dequantize()  # type: ignore[index,operator,union-attr]
    olive.quantize(olive.dequantize(model))
    again = model[0].dequantize()  # type: ignore[index,operator,union-attr]
    assert float((again - once).norm() / once.norm()) < 0.01


def test_one_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(96, 96)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    olive.quantize(model)
    assert isinstance(model[0], OVPLinear) and model[0] is model[2]
    olive.dequantize(model)
    assert type(model[0]) is nn.Linear and model[0] is model[2]


def test_tied_layers_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 96))
    model[1].weight = model[0].weight
    olive.quantize(model)
    assert model[1].weight is model[0].weight and type(model[0]) is nn.Linear
    assert isinstance(model[2], OVPLinear)


def test_parts_of_a_model_one_after_the_other() -> None:
    model = nn.Sequential(models.plain(), models.plain(33))
    olive.quantize(model[0])
    with pytest.raises(
        ValueError, match=r"model: expected a model that is not quantized, got quantized 0.0; call"
    ):
        olive.quantize(model)
    olive.quantize(model[1])
    assert model(torch.ones(2, 96)).shape == (2, 33)
    olive.dequantize(model)
    assert not any(isinstance(module, OVPLinear) for module in model.modules())


def spoiled(value: float) -> nn.Module:
    model = models.plain()
    with torch.no_grad():
        model[3].weight[2, 150] = value
    return model


def on_meta() -> nn.Module:
    model = models.plain()
    model[3].weight = nn.Parameter(torch.empty(33, 200, device="meta"))
    return model


class Other(nn.Module):
    """A model without linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (
            lambda: spoiled(math.nan),
            {},
            ValueError,
            r"3.weight: expected finite values, got nan at \[2, 150\]",
        ),
        (
            lambda: spoiled(math.inf),
            {},
            ValueError,
            r"3.weight: expected finite values, got inf at \[2, 150\]",
        ),
        (
            lambda: models.plain().double(),
            {},
            TypeError,
            "0.weight: expected float32, bfloat16 or float16, got",
        ),
        (Other, {}, ValueError, r"expected at least one layer that can be quantized, got none \(embedding"),
        (
            nn.Sequential,
            {},
            ValueError,
            r"expected at least one layer that can be quantized, got none \(no param",
        ),
        (lambda: nn.Linear(4, 4), {}, ValueError, "got a single Linear.*wrap it in nn.Sequential"),
        (models.plain, {"config": {"bits": 4}}, TypeError, "config: expected an olive.QuantConfig, got dict"),
        (models.plain, {"config": "int4"}, TypeError, "config: expected an olive.QuantConfig, got str"),
        (
            models.plain,
            {"calibration": []},
            ValueError,
            "calibration: expected at least one batch or text with a token, got none",
        ),
        (
            models.plain,
            {"config": olive.QuantConfig(skip=("lm_head", "lm_haed"))},
            ValueError,
            "skip: expected names of modules in the model, got 'lm_haed'",
        ),
        (
            models.plain,
            {"config": olive.QuantConfig(skip=("0", "3"))},
            ValueError,
            'got none .*skip holds "0"; skip holds "3"',
        ),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(
    build: Callable[[], nn.Module], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        olive.quantize(model, **arguments)
    assert_untouched(model, before)


def test_weights_without_values_are_an_error() -> None:
    model = on_meta()
    with pytest.raises(
        ValueError, match=r"3.weight: expected a weight with values, got one on the meta device"
    ):
        olive.quantize(model)
    assert type(model[0]) is nn.Linear  # type: ignore[index]


@pytest.mark.parametrize("call", [olive.quantize, olive.dequantize])
def test_not_a_model(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        call("gpt2")


def test_quantizing_twice_is_an_error() -> None:
    model = olive.quantize(models.plain())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got quantized 0; call olive.dequantize\(model\) first"):
        olive.quantize(model)
    with pytest.raises(ValueError, match=r"got quantized model; call"):
        olive.quantize(model[0])  # type: ignore[index]
    assert_untouched(model, before)


def test_dequantizing_a_float_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="model: expected quantized layers, got none"):
        olive.dequantize(models.plain())


def test_dequantizing_a_single_layer_is_an_error() -> None:
    layer = olive.quantize(models.plain())[0]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"got a single OVPLinear; use its to_linear\(\)"):
        olive.dequantize(layer)


@pytest.mark.parametrize("when", ["quantizing", "marking"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_anywhere_leaves_the_model_as_it_was(
    when: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = parameter.quantize_parameter

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("stop")
        return original(*args, **kwargs)

    def fails(*args: Any) -> None:
        raise error("stop")

    if when == "quantizing":
        monkeypatch.setattr(parameter, "quantize_parameter", second_fails)
    else:
        monkeypatch.setattr(quantization, "_mark", fails)
    model = models.plain()
    before = snapshot(model)
    with pytest.raises(error, match="stop"):
        olive.quantize(model)
    assert_untouched(model, before)


def test_interrupted_dequantize_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = olive.quantize(models.plain())
    before = snapshot(model)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "_unmark", fails)
    with pytest.raises(KeyboardInterrupt):
        olive.dequantize(model)
    assert_untouched(model, before)
    assert attached_config(model) == olive.QuantConfig()


def test_plain_models_need_no_transformers() -> None:
    code = (
        "import sys, torch, olive\n"
        "model = torch.nn.Sequential(torch.nn.Linear(32, 4))\n"
        "olive.dequantize(olive.quantize(model))\n"
        "assert 'transformers' not in sys.modules and 'rich' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_short_work_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    olive.quantize(nn.Sequential(nn.Linear(32, 4)), progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("show", "terminal", "expected"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False),
])  # fmt: skip
def test_long_work_shows_a_bar_on_stderr(
    show: bool | None,
    terminal: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with _progress.ProgressBar("quantizing", 10, show) as bar:
        bar.advance(1)
        assert bar._bar is None
        now[0] = 2.5
        bar.advance(4)
        assert (bar._bar is not None) == expected
        if expected:
            assert bar._bar.tasks[0].completed == 5 and bar._bar.tasks[0].total == 10
    out, err = capfd.readouterr()
    assert out == "" and (err != "") == expected
