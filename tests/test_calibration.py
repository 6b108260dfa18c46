"""olive.quantize with activations: data in every form, static scales, layers without data, failures."""

from __future__ import annotations

import copy
import math
import warnings
from collections import UserDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.formats import unpack_scale
from olive.nn import OVPExperts, OVPLinear
from tests import models
from tests.test_quantize import assert_untouched, snapshot

STATIC = olive.QuantConfig(activations="int8", activation_group_size=0)
DYNAMIC = olive.QuantConfig(activations="int8")
TINY_LLAMA = Path(__file__).parents[1] / "examples" / "tiny_llama"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.grids.PLAIN_GRID", (0.8,))


def scales(model: nn.Module) -> list[float]:
    return [
        float(unpack_scale(module.activation_scale)[0])
        for module in model.modules()
        if isinstance(module, OVPLinear) and module.activation_scale is not None
    ]


class Named(nn.Module):
    """Takes its input by name, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor, sign: float = 1.0) -> Tensor:
        return self.fc(sign * x)


@pytest.mark.parametrize("form", ["mapping", "encoding", "tuple", "list", "tensor", "generator"])
def test_every_form_of_data(form: str) -> None:
    x = torch.randn(6, 16)
    batches: Any = {
        "mapping": [{"x": x, "sign": -1.0}, {"x": 2 * x}],
        "encoding": [UserDict(x=x), UserDict(x=2 * x)],  # what tokenizers return is one
        "tuple": [(x,), (2 * x, 1.0)],
        "list": [[x], [2 * x]],
        "tensor": [x, 2 * x],
        "generator": (factor * x for factor in (1, 2)),
    }[form]
    model = olive.quantize(Named(), STATIC, calibration=batches)
    (scale,) = scales(model)
    assert scale == pytest.approx(float((2 * x).abs().max()) / 127, rel=0.008)  # 7 significant bits
    assert model.fc.activation_figures.sqnr_db > 30  # type: ignore[union-attr]


def test_the_float_model_runs_in_eval_mode_without_gradients_and_is_restored() -> None:
    model = models.plain().train()
    model[2].eval()
    seen: list[tuple[bool, bool]] = []
    model[1].register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.requires_grad))
    )
    flags = [module.training for module in model.modules()]
    olive.quantize(model, STATIC, calibration=[torch.randn(3, 96)])
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == flags
    assert all(len(module._forward_pre_hooks) == 0 for module in model.modules())


def test_static_scales_see_the_float_model() -> None:
    model, x = models.plain(), torch.randn(50, 96)
    with torch.no_grad():
        inner = model[:3](x)
    olive.quantize(model, STATIC, calibration=[x[:30], x[30:]])
    expected = [float(x.abs().max()) / 127, float(inner.abs().max()) / 127]
    assert scales(model) == pytest.approx(expected, rel=0.008)


def test_data_with_dynamic_scales_fill_the_report() -> None:
    one, other = models.plain(), models.plain()
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 96)
    config = olive.QuantConfig(bits=8, activations="int8")  # 8-bit weights are not weighed
    olive.quantize(one, config)
    olive.quantize(other, config, calibration=[x])
    assert torch.equal(one(x), other(x))
    assert one[0].activation_figures is None and other[0].activation_figures.sqnr_db > 30


def test_data_weigh_the_columns_of_four_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 96) * torch.logspace(-2, 1, 96)
    errors = {}
    for data in (None, [x]):
        model = nn.Sequential(nn.Linear(96, 64, bias=False))
        model.load_state_dict({"0.weight": torch.randn(64, 96, generator=torch.Generator().manual_seed(1))})
        with torch.no_grad():
            exact = model(x)
            olive.quantize(model, calibration=data)
            errors[data is None] = float((model(x) - exact).norm())
    assert errors[False] < 0.95 * errors[True]


def test_the_search_is_given_what_reached_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.ptq import parameter

    seen: list[Tensor] = []
    original = parameter.quantize_weight

    def noted(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["importance"])
        return original(weight, *args, **kwargs)

    monkeypatch.setattr(parameter, "quantize_weight", noted)
    model, x = models.plain(), [torch.randn(30, 96), torch.randn(4, 96)]
    olive.quantize(model, calibration=x)
    energy = torch.cat(x).double().square().sum(0)
    energy = energy + 0.01 * energy.mean()
    assert torch.allclose(seen[0], (energy / energy.max()).float(), rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        olive.QuantConfig(activations="ovp4", activation_group_size=32, activation_codebook="adaptive"),
        olive.QuantConfig(activations="ovp8", bits=8),
        olive.QuantConfig(activations="ovp8", bits=8, activation_group_size=0),
        olive.presets.paper_w8a8(),
        olive.presets.paper_w4a4(),
    ],
    ids=str,
)
def test_close_to_the_float_model(config: olive.QuantConfig) -> None:
    model, x = models.plain(), torch.randn(64, 96)
    with torch.no_grad():
        exact = model(x)
        olive.quantize(model, config, calibration=[x])
        error = float((model(x) - exact).norm() / exact.norm())
    # 8 bits lose about 1 % in each of two layers, 4-bit activations and weights about 12 % each.
    assert error < (0.03 if config.bits == 8 else 0.3)
    assert "Inputs of quantized layers" in olive.report(model).table()


class Branches(nn.Module):
    """Two heads, of which the data reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.other = nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_no_data_reached_are_dynamic_and_named_in_one_warning() -> None:
    model = Branches()
    with pytest.warns(
        UserWarning, match=r"no data reached unused.weight, other.weight: no static scale"
    ) as found:
        olive.quantize(model, STATIC, calibration=[torch.randn(3, 32)])
    assert len(found) == 1 and found[0].filename == __file__
    assert model.used.activation_format.group_size == 0  # type: ignore[union-attr]
    for layer in (model.unused, model.other):
        assert layer.activation_format.group_size == -1 and int(layer.activation_scale) == 0  # type: ignore[union-attr,arg-type]
        assert layer(torch.randn(2, 32)).isfinite().all()
    layers = {layer.name: layer for layer in olive.report(model).layers}
    assert layers["used"].activations == "int8 tensor" and layers["unused"].activations == "int8 token"
    assert layers["unused"].activation_sqnr_db is None
    twin = Branches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        olive.quantize(twin, STATIC, calibration=[torch.randn(3, 32)])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.unused(torch.ones(1, 32)), model.unused(torch.ones(1, 32)))


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was() -> None:
    model = Branches()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no data reached"):
            olive.quantize(model, STATIC, calibration=[torch.randn(3, 32)])
    assert_untouched(model, before)


def failing() -> Iterator[Tensor]:
    yield torch.randn(2, 96)
    raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"config": STATIC},
            ValueError,
            r"calibration: expected data for static .* or use QuantConfig\(activation_",
        ),
        (
            {"config": olive.presets.paper_w4a4()},
            ValueError,
            "calibration: expected data for static activation",
        ),
        (
            {"calibration": [torch.randn(2, 96)], "config": olive.QuantConfig(bits=8)},
            ValueError,
            "calibration: expected None, because method 'search' with 8 bits needs no data",
        ),
        ({"tokenizer": len}, ValueError, "tokenizer: expected None without calibration, got one"),
        (
            {"config": STATIC, "calibration": []},
            ValueError,
            "calibration: expected at least one batch or text",
        ),
        (
            {"config": STATIC, "calibration": "text"},
            TypeError,
            "calibration: expected an iterable .* single str; put",
        ),
        (
            {"config": STATIC, "calibration": {"x": 1}},
            TypeError,
            "expected an iterable of batches .* single dict",
        ),
        (
            {"config": STATIC, "calibration": torch.ones(2, 96)},
            TypeError,
            "expected an iterable .* single Tensor",
        ),
        (
            {"config": STATIC, "calibration": 3},
            TypeError,
            "calibration: expected an iterable of batches .* got int",
        ),
        (
            {"config": STATIC, "calibration": [3]},
            TypeError,
            r"calibration\[0\]: expected a mapping, tuple.* got int",
        ),
        ({"config": STATIC, "calibration": failing()}, KeyboardInterrupt, "stop"),
        ({"config": STATIC, "calibration": [torch.ones(2, 5)]}, RuntimeError, "mat1 and mat2"),
        (
            {"config": STATIC, "calibration": ["text"]},
            ValueError,
            "tokenizer: expected one .* no library that the",
        ),
        (
            {"config": DYNAMIC, "calibration": [torch.full((2, 96), math.nan)]},
            ValueError,
            "0: expected finite values to reach this layer in calibration, got NaN or Inf",
        ),
        (
            {"config": STATIC, "calibration": [torch.full((2, 96), math.inf)]},
            ValueError,
            "0: expected finite values to reach this layer in calibration, got NaN or Inf",
        ),
    ],
)
def test_failures_leave_the_model_as_it_was(
    arguments: dict[str, Any], error: type[BaseException], message: str
) -> None:
    model = models.plain().train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        olive.quantize(model, **arguments)
    assert_untouched(model, before)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_texts_with_the_tokenizer_beside_the_checkpoint() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    few = replace(STATIC, skip=("lm_head", "mlp", "q_proj", "o_proj"))  # quick
    texts = ["def main():\n    return 1", "", "class A:\n    pass"]
    one = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    other = copy.deepcopy(one)
    olive.quantize(one, few, calibration=texts)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts if text]
    olive.quantize(other, few, calibration=[{"input_ids": found} for found in ids])
    assert scales(one) == scales(other) and len(scales(one)) == 8


def test_texts_are_cut_to_what_the_model_takes() -> None:
    class Short(Named):
        config = SimpleNamespace(max_position_embeddings=7)

        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            assert input_ids.shape == (1, 7)
            return self.fc(torch.ones(1, 16))

    def tokenizer(text: str, return_tensors: str, truncation: bool, max_length: int) -> dict[str, Tensor]:
        assert truncation and return_tensors == "pt"
        return {
            "input_ids": torch.ones(1, min(len(text), max_length), dtype=torch.long),
            "token_type_ids": None,
        }  # type: ignore[dict-item]

    olive.quantize(Short(), STATIC, calibration=["a long enough text"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="expected at least one batch or text with a token, got none"):
        olive.quantize(Short(), STATIC, calibration=[""], tokenizer=tokenizer)


def test_no_tokenizer_beside_the_model() -> None:
    model = models.build("llama")
    with pytest.raises(
        ValueError, match="found none: the model was not loaded from a path or hub id; pass olive"
    ):
        olive.quantize(model, STATIC, calibration=["text"])
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
def test_what_reaches_the_projections_of_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the inputs that a quantized model's own experts get, its weights being all but exact."""
    model = models.build(name)
    batch = models.inputs(model)
    seen: dict[str, float] = {}
    floats = copy.deepcopy(model)
    olive.quantize(floats, olive.QuantConfig(bits=8, group_size=32, skip=("lm_head",)))
    (experts,) = [module for module in floats.modules() if isinstance(module, OVPExperts)]
    for key, weight in experts.weights().items():
        original = weight.linear

        def linear(
            input: Tensor, *more: Any, key: str = key, original: Any = original, **named: Any
        ) -> Tensor:
            seen[key] = max(seen.get(key, 0.0), float(input.abs().max()) if input.numel() else 0.0)
            return original(input, *more, **named)  # type: ignore[no-any-return]

        monkeypatch.setattr(weight, "linear", linear)
    with torch.no_grad():
        floats(**batch)
    olive.quantize(model, STATIC, calibration=[batch])
    (experts,) = [module for module in model.modules() if isinstance(module, OVPExperts)]
    for key, weight in experts.weights().items():
        found = float(unpack_scale(weight.activation_scale)[0]) * 127  # type: ignore[arg-type]
        assert found == pytest.approx(seen[key], rel=0.05), key


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_lora_trains_on_quantized_activations() -> None:
    from peft import LoraConfig, get_peft_model

    from olive.hf.peft import with_quantized_layers

    model = models.build("llama")
    olive.quantize(model, DYNAMIC)
    adapted = get_peft_model(
        model, with_quantized_layers(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    )
    batch = models.inputs(model)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and float(g.abs().max()) > 0 for g in gradients)
