"""Checkpoints of models with quantized activations and 8-bit weights: round trips, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import olive
from olive.hf.config import OliveConfig
from olive.nn import ActivationFigures, OVPWeight
from olive.presets import paper_w4a4, paper_w8a8
from tests import models
from tests.hf.tiny import logits, same_tensors, tiny_llama

DATA = [{"input_ids": torch.arange(3, 40)[None]}]
UP = "model.layers.1.mlp.up_proj"
CONFIGS = {
    "W4A8 dynamic": olive.QuantConfig(group_size=32, activations="int8"),
    "W4A8 groups": olive.QuantConfig(group_size=32, activations="int8", activation_group_size=64),
    "W4A4 dynamic": olive.QuantConfig(activations="ovp4", activation_codebook="adaptive"),
    "W4A4 static": olive.QuantConfig(activations="ovp4", activation_group_size=0, activation_codebook="nf4"),
    "paper W4A4": paper_w4a4(),
    "paper W8A8": paper_w8a8(),
    "W8A8 static": olive.QuantConfig(bits=8, activations="ovp8", activation_group_size=0),
    "W8A16": olive.QuantConfig(bits=8),
    "paper codebook": olive.QuantConfig(codebook="paper", group_size=-1),
}


@pytest.fixture(autouse=True)
def quick8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.OVP8_GRID", (1.0, 2.0))
    monkeypatch.setattr("olive.ptq.grids.PAPER_GRID", (1.0, 1.6))
    monkeypatch.setattr("olive.ptq.grids.WIDE_PAIR_GRID", (0.8, 1.6))


def quantized(config: olive.QuantConfig, model: nn.Module | None = None) -> nn.Module:
    static = config.activation_format is not None and config.activation_format.is_static
    return olive.quantize(model or tiny_llama(), config, calibration=DATA if static else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_give_the_same_bits(name: str, tmp_path: Path) -> None:
    model = quantized(CONFIGS[name])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.quant == CONFIGS[name]
    assert same_tensors(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    for one, other in zip(olive.report(model).layers, olive.report(loaded).layers, strict=True):
        assert (one.activations, one.bits, one.size_bytes) == (
            other.activations,
            other.bits,
            other.size_bytes,
        )
        if one.activation_sqnr_db is not None:
            assert other.activation_sqnr_db == pytest.approx(one.activation_sqnr_db, abs=1e-5)
            assert other.activation_outlier_share == pytest.approx(one.activation_outlier_share, abs=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("config", [CONFIGS["paper W4A4"], CONFIGS["W8A8 static"]], ids=["4", "8"])
def test_experts_round_trip(config: olive.QuantConfig, tmp_path: Path) -> None:
    model = models.build("mixtral")
    olive.quantize(model, config, calibration=[models.inputs(model)])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_tensors(model, loaded)
    assert torch.equal(models.logits(model), models.logits(loaded))
    weight = loaded.model.layers[0].mlp.experts.down_proj
    assert weight.activation_scale.shape == (1,) and weight.activation_format.is_static


def test_a_layer_without_a_static_scale_loads_the_same(tmp_path: Path) -> None:
    """The head is quantized and never reached: the data goes through the inner model only."""
    model = tiny_llama()
    config = olive.QuantConfig(group_size=32, activations="int8", activation_group_size=0, skip=())
    model.forward, forward = model.model.forward, model.forward  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="no data reached lm_head.weight"):
        olive.quantize(model, config, calibration=DATA)
    model.forward = forward  # type: ignore[method-assign]
    vars(model).pop("forward")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.activation_format.group_size == -1
    assert int(loaded.lm_head.activation_scale) == 0
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("name", ["W4A8 dynamic", "W4A4 dynamic", "W8A16"])
def test_quantizing_while_loading(name: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIGS[name])
    assert torch.equal(logits(loaded), logits(quantized(CONFIGS[name])))
    loaded.save_pretrained(tmp_path / "stored")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert torch.equal(logits(loaded), logits(again))


def test_quantizing_while_loading_needs_dynamic_scales(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected dynamic activation scales .* load the model without it first"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=paper_w4a4())


def test_a_checkpoint_written_before_activations_still_loads(stored: Path) -> None:
    file = stored / "config.json"
    values = json.loads(file.read_text())
    for key in ("activation_group_size", "activation_codebook", "activation_figures"):
        values["quantization_config"].pop(key)
    file.write_text(json.dumps(values))
    before = logits(quantized(olive.QuantConfig(group_size=32)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(stored)), before)


def test_a_state_dict_instead_of_files(tmp_path: Path) -> None:
    model = quantized(CONFIGS["W4A4 static"])
    model.save_pretrained(tmp_path)
    settings = AutoConfig.from_pretrained(tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=dict(state))
    assert torch.equal(logits(loaded), logits(model))
    state.pop(f"{UP}.activation_scale")
    with pytest.raises(ValueError, match=rf"{UP}.activation_scale: expected in the state dict"):
        LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=state)


def edit(path: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    file = path / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if change is None:
        tensors.pop(name)
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata)


def spoiled_pair(codes: Tensor) -> Tensor:
    codes[5, 6:8] = 0x80
    return codes


@pytest.mark.parametrize(
    ("config", "field", "change", "error", "message"),
    [
        (
            "W4A4 static",
            "activation_scale",
            None,
            ValueError,
            "expected in the checkpoint, got no such tensor",
        ),
        (
            "W4A4 static",
            "activation_codebook",
            None,
            ValueError,
            "expected in the checkpoint, got no such tensor",
        ),
        ("W8A8 static", "activation_scale", lambda s: s.float(), TypeError, "expected int16, got float32"),
        (
            "W8A8 static",
            "activation_scale",
            lambda s: s.repeat(2),
            ValueError,
            r"expected shape \(1,\), got \(2,\)",
        ),
        (
            "W8A8 static",
            "activation_scale",
            lambda s: -s.abs(),
            ValueError,
            "expected a positive finite scale",
        ),
        (
            "W8A8 static",
            "activation_scale",
            lambda s: s | 1,
            ValueError,
            "scale without rule bit, or 0, got pattern",
        ),
        ("W4A4 static", "activation_codebook", lambda c: c * 0, ValueError, "expected every outlier|rising"),
        (
            "W8A16",
            "codes",
            spoiled_pair,
            ValueError,
            r"valid outlier-victim pairs, got bytes 0x80 0x80 at \[5, 6\]",
        ),
        ("W8A16", "codes", lambda c: c[:, :32], ValueError, r"expected shape \(96, 64\), got \(96, 32\)"),
        ("W8A16", "scale", lambda s: s * 0, ValueError, "expected positive finite scales without rule bits"),
    ],
)
def test_damaged_checkpoints(
    config: str,
    field: str,
    change: Callable[[Tensor], Tensor] | None,
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    quantized(CONFIGS[config]).save_pretrained(tmp_path)
    edit(tmp_path, f"{UP}.{field}", change)
    with pytest.raises(error, match=message) as found:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert f"{UP}.{field}" in str(found.value)
    assert "save the model again" in str(found.value)


def test_config_keeps_the_figures() -> None:
    figures = {"a.weight": {"sqnr_db": 20.5, "outlier_share": 0.01, "clipped_share": 0.0}}
    config = OliveConfig(CONFIGS["W4A4 static"], sqnr_db={"a.weight": 1.0}, activation_figures=figures)
    again = OliveConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert isinstance(again, OliveConfig)
    assert again.activation_figures == {"a.weight": ActivationFigures(20.5, 0.01, 0.0)}
    assert again.quant == config.quant


@pytest.mark.parametrize("figures", [3, {"a": 1}, {"a": {"sqnr_db": 1.0}}])
def test_bad_figures_are_an_error(figures: object) -> None:
    values = OliveConfig(olive.QuantConfig()).to_dict() | {"activation_figures": figures}
    with pytest.raises(
        TypeError, match=r"quantization_config\.activation_figures: expected an object of objects"
    ):
        OliveConfig.from_dict(values)


def test_memory_of_eight_bits_is_planned_for() -> None:
    model = tiny_llama()
    quantizer = quantized(olive.QuantConfig(bits=8), model).hf_quantizer
    assert not any(module.is_packed for module in model.modules() if isinstance(module, OVPWeight))
    quantizer.pre_quantized = False
    quantizer.param_needs_quantization = lambda *args: True
    assert quantizer.param_element_size(model, "x", torch.empty(0)) == pytest.approx(8.125 / 8)


def test_loading_warns_of_nothing(tmp_path: Path) -> None:
    quantized(CONFIGS["W4A4 dynamic"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_left_on_disk_are_an_error(tmp_path: Path) -> None:
    quantized(CONFIGS["W4A8 dynamic"]).save_pretrained(tmp_path / "stored")
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(
        ValueError, match=r"device_map: expected no disk with quantized activations, got model\.layers\.0"
    ):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "stored", device_map=places, offload_folder=tmp_path / "offload"
        )
