"""Rotation of what down projections read: the same function, what is gathered, stored and saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive import ops
from olive.nn import OVPExperts, OVPLinear, OVPWeight
from olive.ops.online_hadamard import block_size
from olive.ptq.calibration import InputCollector
from olive.ptq.moments import ColumnMoment, SecondMoment
from olive.ptq.rotation import rotate
from tests import models
from tests.ptq.test_rotation import BUILDERS, _built
from tests.test_quantize import assert_untouched, snapshot

ONLINE = olive.QuantConfig(rotate=True, rotate_online=True, group_size=32)
# Leaves everything but the down projections in full precision, for errors that are theirs.
OTHERS = ("lm_head", "self_attn", "gate_proj", "up_proj")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.grids.PLAIN_GRID", (0.8,))


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers compute with float64 weights that nothing was lost of."""
    from olive.ptq import parameter

    original = parameter.quantize_into

    def keep(weight: OVPWeight, float_weight: Tensor, *args: Any, **more: Any) -> Any:
        if weight.input_rotation:
            turned = float_weight.detach().double()
            weight.exact = ops.block_hadamard(turned, weight.input_rotation)  # type: ignore[assignment]
        else:
            weight.exact = float_weight.detach().double()  # type: ignore[assignment]
        return original(weight, float_weight, *args, **more)

    def linear(
        self: OVPWeight, input: Tensor, bias: Tensor | None = None, expert: int | None = None
    ) -> Tensor:
        x = input.double()
        x = ops.block_hadamard(x, self.input_rotation) if self.input_rotation else x
        weight: Any = self.exact if expert is None else self.exact[expert]  # type: ignore[index]
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.double()).to(input.dtype)

    monkeypatch.setattr("olive.quantization.quantize_into", keep)
    monkeypatch.setattr(OVPWeight, "linear", linear)


def _llama(intermediate: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = models.llama(attention_bias=True, mlp_bias=True, intermediate_size=intermediate)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def _rotated(model: nn.Module) -> Iterator[tuple[str, OVPWeight]]:
    for name, module in model.named_modules():
        if isinstance(module, OVPWeight) and module.input_rotation:
            yield name, module


@pytest.mark.parametrize("name", sorted(BUILDERS))
@torch.no_grad()
def test_balancing_changes_nothing_and_is_taken_back(name: str) -> None:
    model = _built(name)
    before, originals = models.logits(model), snapshot(model)
    undo = rotate(model, balance=True)
    after = models.logits(model)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max()) + 1e-6
    for module in model.modules():
        up, down = getattr(module, "up_proj", None), getattr(module, "down_proj", None)
        if isinstance(up, nn.Linear) and isinstance(down, nn.Linear):
            ratio = up.weight.norm(dim=1) / down.weight.norm(dim=0)
        elif isinstance(down, nn.Parameter):
            ratio = module.gate_up_proj.chunk(2, 1)[1].norm(dim=2) / down.norm(dim=1)
        else:
            continue
        assert float((ratio / ratio[..., :1] - 1).abs().max()) < 1e-4
    undo()
    assert_untouched(model, originals)


def test_channels_without_weights_are_balanced_too() -> None:
    model = _llama(96)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 0
    before = models.logits(model)
    rotate(model, balance=True)
    after = models.logits(model)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max()) + 1e-6


@pytest.mark.parametrize("columns", [96, 176])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotating_input_and_weight_changes_nothing(columns: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, columns, dtype=dtype), torch.randn(33, columns, dtype=dtype)
    block = block_size(columns)
    y = ops.block_hadamard(x, block) @ ops.block_hadamard(weight, block).T
    assert float((y - x @ weight.T).abs().max()) < 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("intermediate", [96, 176])
def test_the_function_stays(intermediate: int, exactly: None) -> None:
    model = _llama(intermediate)
    before = models.logits(model)
    olive.quantize(model, ONLINE)
    blocks = {name: weight.input_rotation for name, weight in _rotated(model)}
    assert blocks == {"model.layers.0.mlp.down_proj": {96: 32, 176: 16}[intermediate]}
    after = models.logits(model)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max()) + 1e-6


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_function_of_experts_stays(name: str, exactly: None) -> None:
    model = _built(name)
    before = models.logits(model)
    olive.quantize(model, ONLINE)
    assert [name.rpartition(".")[2] for name, _ in _rotated(model)] == ["down_proj"]
    after = models.logits(model)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max()) + 1e-6


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_quantized_saved_loaded_and_dequantized(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _built(name)
    exact = models.logits(model)
    olive.quantize(model, ONLINE)
    rounded = models.logits(model)
    assert float((rounded - exact).norm() / exact.norm()) < 0.3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(models.logits(loaded), rounded)
    assert loaded.config.quantization_config.quant == ONLINE
    assert dict((n, w.input_rotation) for n, w in _rotated(loaded)) == {
        n: w.input_rotation for n, w in _rotated(model)
    }
    for one in (model, loaded):
        olive.dequantize(one)
        assert not any(isinstance(module, (OVPLinear, OVPExperts)) for module in one.modules())
        assert float((models.logits(one) - rounded).abs().max()) < 1e-4 * float(rounded.abs().max())


def test_a_bare_model_is_loaded_with_the_rotation(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = olive.quantize(_llama(176), ONLINE)
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert [(name, one.input_rotation) for name, one in _rotated(bare)] == [("layers.0.mlp.down_proj", 16)]


def test_checkpoints_without_the_field_load_as_before(tmp_path: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM

    model = olive.quantize(_llama(176), olive.QuantConfig(rotate=True, group_size=32))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"].pop("rotate_online") is False
    file.write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(_rotated(loaded))
    assert torch.equal(models.logits(loaded), models.logits(model))


@pytest.mark.parametrize(("bits", "activations"), [(4, "int8"), (4, "ovp4"), (8, "ovp8")])
def test_static_scales_are_of_the_rotated_input(bits: int, activations: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _llama(176)
    config = olive.QuantConfig(
        bits=bits,
        activations=activations,
        activation_group_size=0,
        group_size=32,
        rotate=True,
        rotate_online=True,
    )
    read: list[Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    olive.quantize(model, config, calibration=[models.inputs(model)])
    hook.remove()
    layer = model.model.layers[0].mlp.down_proj
    if activations == "int8":
        scale = float(layer.activation_scale.view(torch.bfloat16))
        largest = float(ops.block_hadamard(read[0], 16).abs().max())
        assert scale == pytest.approx(largest / 127, rel=2**-7)
    assert layer.activation_figures.sqnr_db > 10
    found = models.logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(models.logits(loaded), found)
    assert loaded.model.layers[0].mlp.down_proj.activation_figures is not None


def _inject(model: Any, factor: float, channels: tuple[int, ...] = (5, 40)) -> None:
    """Outliers in what the down projection reads; the same function."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[list(channels)] *= factor
            if layer.mlp.up_proj.bias is not None:
                layer.mlp.up_proj.bias[list(channels)] *= factor
            layer.mlp.down_proj.weight[:, list(channels)] /= factor


def _error(model: Any, config: olive.QuantConfig, data: list[Any]) -> float:
    one = copy.deepcopy(model)
    exact = models.logits(one)
    olive.quantize(one, config, calibration=data, progress=False)
    return float((models.logits(one) - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_outliers_before_the_down_projection_cost_nothing(method: str) -> None:
    plain = _llama(176)
    injected = copy.deepcopy(plain)
    _inject(injected, 300.0)
    data = [models.inputs(plain)] * 3
    errors = {}
    for online in (False, True):
        config = olive.QuantConfig(
            method=method, activations="ovp4", group_size=32, rotate=True, rotate_online=online, skip=OTHERS
        )
        errors[online] = [_error(model, config, data) for model in (plain, injected)]
    assert errors[True][1] < 1.02 * errors[True][0]
    assert errors[True][1] < errors[False][1]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_with_gptq(name: str) -> None:
    model = _built(name)
    config = olive.QuantConfig(
        method="gptq", codebook="nf4", rotate=True, rotate_online=True, group_size=32, activations="int8"
    )
    with pytest.warns(UserWarning, match="too little data reached"):
        assert _error(model, config, [models.inputs(model)] * 3) < 0.3


@pytest.mark.parametrize("codebook", ["int4", "flint4", "learned", "auto"])
def test_with_other_codebooks(codebook: str) -> None:
    model = _llama(96)
    config = olive.QuantConfig(codebook=codebook, rotate=True, rotate_online=True, group_size=32)
    assert _error(model, config, [models.inputs(model)]) < 0.3


def test_moments_and_samples_are_of_the_rotated_input() -> None:
    layer = nn.Linear(96, 8)
    x, z = torch.randn(2, 9, 96), torch.randn(2, 9, 96)
    turned, beside = (ops.block_hadamard(one, 32).reshape(-1, 96) for one in (x, z))
    for moment in (SecondMoment(), ColumnMoment()):
        collector = InputCollector({"a.weight": layer}, rotations={"a.weight": 32}, moment=moment)
        with collector.collecting({"a.weight": z}):
            layer(x)
        found, sample = collector.moments()["a.weight"], collector.samples()["a.weight"]
        assert sample.rows is not None and torch.equal(sample.rows, turned)
        assert sample.largest == float(turned.abs().max())
        if isinstance(found, SecondMoment):
            assert found.total is not None and found.drift is not None
            assert torch.allclose(found.total, turned.T @ turned, atol=1e-4)
            assert torch.allclose(found.drift.products, (beside - turned).T @ turned, atol=1e-4)
        else:
            assert torch.allclose(found.energy().float(), turned.square().sum(0), rtol=1e-5)


def test_stacks_laid_out_the_other_way_are_rotated_over_their_columns() -> None:
    from olive.ptq.parameter import quantize_into

    parameter = torch.randn(2, 96, 33)
    weight = OVPWeight(33, 96, 32, bits=8, experts=2, transposed=True)
    weight.input_rotation = 32
    config = olive.QuantConfig(bits=8, group_size=32)
    quantize_into(weight, parameter, config, name="a", samples={}, moments={})
    assert float((weight.to_float() - parameter).norm() / parameter.norm()) < 0.02
    stored = ops.block_hadamard(parameter.transpose(-1, -2), 32)
    assert float((weight.dequantize() - stored).norm() / stored.norm()) < 0.02
    x = torch.randn(5, 96)
    for expert in range(2):
        exact = x @ parameter[expert]
        assert float((weight.linear(x, expert=expert) - exact).norm() / exact.norm()) < 0.02


def test_half_precision_models() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = _llama(176, dtype)
        exact = models.logits(model).float()
        olive.quantize(model, ONLINE)
        rounded = models.logits(model).float()
        assert float((rounded - exact).norm() / exact.norm()) < 0.3
        olive.dequantize(model)
        layer = model.model.layers[0].mlp.down_proj
        assert layer.weight.dtype == dtype
        assert float((models.logits(model).float() - rounded).norm() / rounded.norm()) < 0.03


def test_repr_and_weight() -> None:
    model = _llama(176)
    layer = olive.quantize(model, ONLINE).model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    assert "input_rotation=16" in repr(layer) and "input_rotation" not in repr(
        model.model.layers[0].mlp.up_proj
    )
    turned = ops.block_hadamard(layer.dequantize(), 16)
    assert torch.equal(layer.weight.clone(), turned) and torch.equal(layer.to_linear().weight, turned)


@pytest.mark.parametrize("activations", [None, "ovp4"])
def test_compiled_layer_gives_the_same_result(activations: str | None) -> None:
    config = olive.QuantConfig(rotate=True, rotate_online=True, group_size=32, activations=activations)
    layer = olive.quantize(_llama(176), config).model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 176, requires_grad=True)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    gradient = x.grad
    x.grad = None
    layer(x).sum().backward()
    assert gradient is not None and torch.equal(gradient, x.grad)  # type: ignore[arg-type]
    expected = layer.to_float().sum(0).expand(5, -1)
    assert torch.allclose(gradient, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_see_the_input_as_it_was() -> None:
    peft = pytest.importorskip("peft")
    from olive.hf.peft import with_quantized_layers

    model = olive.quantize(_llama(176), ONLINE)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, with_quantized_layers(lora)).eval()
    found = models.logits(adapted)
    olive.dequantize(adapted)
    assert float((models.logits(adapted) - found).abs().max()) < 1e-4 * float(found.abs().max())
    merged = adapted.merge_and_unload()
    assert float((models.logits(merged) - found).abs().max()) < 1e-4 * float(found.abs().max())


def test_layers_left_alone_are_not_rotated() -> None:
    model = _llama(176)
    config = olive.QuantConfig(rotate=True, rotate_online=True, group_size=32, skip=("lm_head", "down_proj"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="rotate_online: expected False for a model without a down_proj to"):
        olive.quantize(model, config)
    assert_untouched(model, before)
    two = models.llama(num_hidden_layers=2)
    olive.quantize(two, olive.QuantConfig(rotate=True, rotate_online=True, skip=("layers.0.mlp.down_proj",)))
    assert [name for name, _ in _rotated(two)] == ["model.layers.1.mlp.down_proj"]


def test_odd_columns_are_refused() -> None:
    model = _llama(95)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"down_proj.weight: expected an even number of columns .*, got 95"):
        olive.quantize(model, ONLINE)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_failure_later_on_leaves_the_model_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.ptq import parameter

    model = _llama(176)
    before = snapshot(model)
    original, done = parameter.quantize_parameter, []

    def fails(*args: Any, **more: Any) -> Any:
        done.append(more["name"])
        if "down_proj" in more["name"]:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(parameter, "quantize_parameter", fails)
    config = olive.QuantConfig(method=method, rotate=True, rotate_online=True, group_size=32)
    with pytest.raises(KeyboardInterrupt):
        olive.quantize(model, config, calibration=[models.inputs(model)] * 3, progress=False)
    assert len(done) > 3
    assert_untouched(model, before)


def test_while_loading_it_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _llama(176).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"rotate=True, which changes the whole model; load the model without"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ONLINE)
