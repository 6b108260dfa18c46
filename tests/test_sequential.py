"""Method "gptq" through olive.quantize: every layer on what the quantized layers before it give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.nn import OVPExperts, OVPLinear
from olive.ptq import parameter as parameters
from olive.ptq.gptq import compensate
from olive.ptq.moments import Drift
from olive.walk import walk
from tests import models
from tests.test_quantize import assert_untouched, snapshot

GPTQ = olive.QuantConfig(method="gptq", codebook="nf4", group_size=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.gptq.MULTIPLES", (1.0,))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Second moments that layers were quantized with, in order."""
    found: list[Tensor] = []

    def noted(weight: Tensor, second_moment: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(second_moment.clone())
        return compensate(weight, second_moment, *args, **kwargs)

    monkeypatch.setattr(parameters, "compensate", noted)
    return found


def _data(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of distinct tokens or images."""
    first = models.inputs(model)
    batches = [first]
    for seed in range(1, count):
        generator = torch.Generator().manual_seed(seed)
        batches.append(
            {
                key: value[torch.randperm(len(value), generator=generator)].flip(-1)
                if value.is_floating_point()
                else torch.randint(3, models.VOCABULARY, value.shape, generator=generator)
                if key.endswith("input_ids")
                else value
                for key, value in first.items()
            }
        )
    return batches


@pytest.fixture(autouse=True)
def no_more_rows_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.moments.LEAST_ROWS", 0.0)


def _moments_of(model: nn.Module, data: list[Any], names: list[str]) -> dict[str, Tensor]:
    """What reaches the layers of a quantized model."""
    found: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        found[name] = found.get(name, torch.zeros(1)) + rows.T @ rows

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, OVPLinear) and name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch, use_cache=False) if "use_cache" in model.forward.__annotations__ else model(
                **batch
            )
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", sorted(models.ARCHITECTURES))
def test_every_layer_sees_what_the_finished_model_gives_it(name: str, seen: list[Tensor]) -> None:
    model = models.build(name)
    data = _data(model)
    targets = walk(model, GPTQ).targets
    linears = [target.name for target in targets if target.kind in ("linear", "conv1d")]
    olive.quantize(model, GPTQ, calibration=data, progress=False)
    for target in targets:
        assert isinstance(model.get_submodule(target.name), (OVPLinear, OVPExperts))
    reached = _moments_of(model, data, linears)
    # Each moment that was used is one that the finished model shows; experts have their own, of other shapes.
    for name_of_layer, moment in reached.items():
        scale = float(moment.abs().max())
        close = [float((one - moment).abs().max()) / scale for one in seen if one.shape == moment.shape]
        assert min(close) < 1e-4, name_of_layer


def test_layers_of_one_input_are_one_stage() -> None:
    model = models.llama()
    passes = 0
    layer = model.model.layers[0]  # type: ignore[union-attr]

    def count(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1

    handle = layer.register_forward_pre_hook(count)  # type: ignore[union-attr]
    data = _data(model)
    olive.quantize(model, GPTQ, calibration=data, progress=False)
    handle.remove()
    # Once to see the order of units, once per batch to record what it is given, once to see its stages (q k
    # v, o, gate up, down), and twice per batch for each of the four: float
    # on float inputs, and quantized as far as it is.
    assert passes == 1 + len(data) + 1 + 2 * 4 * len(data)


class Deep(nn.Module):
    """Two lists of blocks, a layer between them that both lists need, and one block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(2)
        )
        self.between = nn.Linear(32, 32)
        self.second = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.twice = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = x + block(x)
        x = self.between(x)
        for block in self.second:
            x = torch.relu(block(input=x))
        return self.twice(torch.relu(self.twice(x)))


def _deep_data() -> list[Tensor]:
    return [torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_any_shape_of_model(seen: list[Tensor]) -> None:
    model, data = Deep(), _deep_data()
    with pytest.warns(UserWarning, match="too little data reached unused.weight"):
        olive.quantize(model, GPTQ, calibration=data, progress=False)
    collector = {}
    for name, module in model.named_modules():
        if isinstance(module, OVPLinear):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: collector.setdefault(name, []).append(
                    args[0] if args else kwargs["input"]
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        for batch in data:
            model(batch)
    assert len(seen) == 8  # all but the unused one
    for name, inputs in collector.items():
        if name == "twice":
            continue  # its second input depends on itself, and it was float when it was looked at
        rows = torch.cat(inputs)
        moment = rows.T @ rows
        assert any(
            one.shape == moment.shape and torch.allclose(one, moment, rtol=1e-4, atol=1e-3) for one in seen
        ), name


def test_better_than_the_search_on_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 4
    data = [torch.randn(500, 64, generator=generator) @ mix for _ in range(2)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    errors = {}
    for method in ("search", "gptq"):
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            exact = model(data[1])
            olive.quantize(model, olive.QuantConfig(method=method, group_size=32), calibration=data[:1])
            errors[method] = float((model(data[1]) - exact).norm() / exact.norm())
    assert errors["gptq"] < 0.8 * errors["search"]


def test_layers_are_given_what_the_float_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    drifts: list[Tensor] = []

    def noted(*args: Any, drift: Drift | None = None, **kwargs: Any) -> Any:
        assert drift is not None
        drifts.append(drift.products)
        return compensate(*args, drift=drift, **kwargs)

    monkeypatch.setattr(parameters, "compensate", noted)
    model = models.llama(num_hidden_layers=2)
    exact = copy.deepcopy(model)
    data = _data(model)
    names = [target.name for target in walk(model, GPTQ).targets]
    olive.quantize(model, GPTQ, calibration=data, progress=False)
    inputs: list[dict[str, list[Tensor]]] = [{}, {}]
    for one, seen in zip((exact, model), inputs, strict=True):
        for name in names:
            one.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
        with torch.no_grad():
            for batch in data:
                one(**batch, use_cache=False)
    # Layers are quantized in the order of `walk` here: q, k, v, o, gate, up, down.
    assert len(drifts) == len(names) == 14
    for name, drift in zip(names, drifts, strict=True):
        z, x = (torch.cat(seen[name]) for seen in inputs)
        expected = (z - x).T @ x
        assert torch.allclose(drift, expected, rtol=1e-3, atol=1e-4 * float((x.T @ x).abs().max())), name
    assert not bool(drifts[0].any()) and bool(drifts[-1].any())


def test_with_quantized_activations() -> None:
    model, data = models.plain(), [torch.randn(300, 96) for _ in range(2)]
    config = olive.QuantConfig(method="gptq", activations="ovp8", activation_group_size=0, group_size=32)
    with torch.no_grad():
        exact = model(data[0])
        olive.quantize(model, config, calibration=data, progress=False)
        assert float((model(data[0]) - exact).norm() / exact.norm()) < 0.2
    for module in model.modules():
        if isinstance(module, OVPLinear):
            assert int(module.activation_scale) != 0 and module.activation_figures is not None


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_experts_that_saw_little_are_searched_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.moments.LEAST_ROWS", 0.25)
    model = models.build(name)
    with pytest.warns(UserWarning, match=r"too little data reached .*experts.*\[\d\].*searched instead"):
        olive.quantize(model, GPTQ, calibration=[models.inputs(model)], progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
def test_a_failure_half_way_leaves_the_model_and_names_the_layer(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def third_fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("out of luck")
        return compensate(*args, **kwargs)

    monkeypatch.setattr(parameters, "compensate", third_fails)
    model = models.llama()
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match="out of luck") as caught:
        olive.quantize(model, GPTQ, calibration=_data(model), progress=False)
    assert_untouched(model, before)
    assert model.training
    assert any(
        "while quantizing model.layers.0.self_attn.v_proj.weight" in note for note in caught.value.__notes__
    )
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_failing_batch_leaves_the_model() -> None:
    model = models.llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        olive.quantize(model, GPTQ, calibration=[*_data(model), {"nonsense": 1}], progress=False)
    assert_untouched(model, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_arguments() -> None:
    model = models.plain()
    with pytest.raises(ValueError, match="calibration: expected data for method 'gptq', got None"):
        olive.quantize(model, GPTQ)
    with pytest.raises(ValueError, match="calibration: expected at least one batch or text"):
        olive.quantize(model, GPTQ, calibration=[])
    with pytest.raises(ValueError, match="got 'gptq', which makes 4 bits"):
        olive.QuantConfig(method="gptq", bits=8)
    with pytest.raises(ValueError, match="expected 'auto' or one codebook with method 'gptq', got 'paper'"):
        olive.QuantConfig(method="gptq", codebook="paper")
    for damping in (0.0, 2.0, 1, "much"):
        with pytest.raises(ValueError, match="damping: expected a float above 0 and up to 1"):
            olive.QuantConfig(method="gptq", damping=damping)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation_order: expected the default unless method is 'gptq'"):
        olive.QuantConfig(activation_order=True)


def test_saved_and_loaded(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = models.llama()
    data = _data(model)
    olive.quantize(model, GPTQ, calibration=data, progress=False)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(models.logits(loaded), models.logits(model))
    assert loaded.config.quantization_config.quant == GPTQ
