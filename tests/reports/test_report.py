"""olive.report: every figure against one counted by hand from the stored tensors, on all kinds of layers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.formats import unpack_scale
from olive.nn import OVPWeight
from olive.reports import LayerReport, Report
from olive.walk import walk
from tests import models


def quantized(name: str, **config: Any) -> nn.Module:
    return olive.quantize(models.build(name), olive.QuantConfig(**config))


def stored_bytes(model: nn.Module) -> int:
    """Size of a checkpoint: the state dict with shared tensors once."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        # codes and scales come unpacked, as new tensors: the last part of the name keeps them apart
        tensors[(id(value), key if not isinstance(value, nn.Parameter) else "")] = value
    return sum(value.numel() * value.element_size() for value in tensors.values())


def pairs_and_plain(weight: OVPWeight) -> tuple[float, float]:
    """Shares by a loop over nibbles."""
    codes, scale, _ = weight.canonical()
    if weight.experts is None:
        codes, scale = codes[None], scale[None]
    group = weight.group_size if weight.group_size > 0 else weight.in_features + 1
    outliers = 0
    for stack in range(codes.shape[0]):
        plain = unpack_scale(scale[stack])[1].tolist()
        for row, line in enumerate(codes[stack].tolist()):
            rules = plain[0 if weight.group_size == 0 else row]
            for pair, byte in enumerate(line):
                holds = not rules[2 * pair // group]
                outliers += holds and (byte & 15 == 8 or byte >> 4 == 8)
    return outliers / codes.numel(), float(unpack_scale(scale)[1].float().mean())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral", "llama4", "vit"])
def test_figures_are_those_of_the_stored_tensors(name: str) -> None:
    model = quantized(name)
    report = olive.report(model)
    weights = {full: weight for target in walk(model).quantized for full, weight in target.weights().items()}
    assert len(report.layers) == len(weights)
    for layer, (full, weight) in zip(report.layers, weights.items(), strict=True):
        assert full in (layer.name, f"{layer.name}.weight")
        codes, scale, codebook = weight.canonical()
        assert layer.size_bytes == codes.numel() + 2 * scale.numel() + codebook.numel()
        assert layer.parameters == math.prod(layer.shape) == weight.quantized_values
        assert layer.bits_per_weight == 8 * layer.size_bytes / layer.parameters
        assert (layer.codebook, layer.group_size) == ("adaptive", 128)
        assert layer.sqnr_db == weight.sqnr_db
        outliers, plain = pairs_and_plain(weight)
        assert layer.outlier_share == pytest.approx(outliers)
        assert layer.plain_share == pytest.approx(plain)
    assert report.model_bytes == stored_bytes(model)
    assert report.quantized_share == walk(model).share
    assert report.skipped == walk(model).skipped


@pytest.mark.parametrize("group_size", [32, 128, -1, 0])
@pytest.mark.parametrize("codebook", ["int4", "flint4", "nf4", "adaptive", "learned"])
def test_codebooks_and_groups(codebook: str, group_size: int) -> None:
    model = olive.quantize(models.plain(), olive.QuantConfig(codebook=codebook, group_size=group_size))
    for layer, index in zip(olive.report(model).layers, (0, 3), strict=True):
        assert (layer.name, layer.codebook, layer.group_size) == (str(index), codebook, group_size)
        outliers, plain = pairs_and_plain(model[index])
        assert layer.outlier_share == pytest.approx(outliers)
        assert layer.plain_share == pytest.approx(plain)
    assert olive.report(model).table()


def test_sizes_before_quantization() -> None:
    model = models.build("qwen3", torch.bfloat16)
    before = stored_bytes(model)
    assert olive.report(olive.quantize(model)).float_bytes == before


def test_kinds_and_shapes_of_experts() -> None:
    layers = {layer.name.split(".")[-1]: layer for layer in olive.report(quantized("mixtral")).layers}
    assert layers["gate_up_proj"].shape == (4, 384, 96)
    assert layers["gate_up_proj"].kind == layers["down_proj"].kind == "experts"
    assert layers["gate_up_proj"].name == "model.layers.0.mlp.experts.gate_up_proj"
    transposed = {layer.name: layer for layer in olive.report(quantized("llama4")).layers}
    down = transposed["model.layers.0.feed_forward.experts.down_proj"]
    assert (down.kind, down.shape) == ("sorted_experts", (4, 96, 192))


def test_the_model_is_not_changed() -> None:
    model = quantized("llama")
    before = {key: (id(value), value.clone()) for key, value in model.named_parameters()}
    olive.report(model)
    for key, value in model.named_parameters():
        assert id(value) == before[key][0]
        assert torch.equal(value, before[key][1])


def test_a_loaded_model_gives_the_same_report(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized("llama")
    model.save_pretrained(tmp_path)
    loaded = olive.report(AutoModelForCausalLM.from_pretrained(tmp_path))
    expected = olive.report(model)
    for got, layer in zip(loaded.layers, expected.layers, strict=True):
        assert got.sqnr_db == pytest.approx(layer.sqnr_db, abs=0.001)
        assert {**got.to_dict(), "sqnr_db": 0} == {**layer.to_dict(), "sqnr_db": 0}
    assert loaded.skipped == expected.skipped
    assert loaded.model_bytes == expected.model_bytes


def test_a_single_layer(tmp_path: Path) -> None:
    report = olive.report(olive.quantize(models.plain())[0])
    assert [layer.name for layer in report.layers] == [""]
    assert "(model)" in report.table()
    assert "<td>(model)</td>" in report.html(tmp_path / "page.html").read_text()


def test_unknown_ratio() -> None:
    model = olive.quantize(models.plain())
    model[0].sqnr_db = None
    report = olive.report(model)
    assert report.layers[0].sqnr_db is None
    assert json.loads(report.json())["layers"][0]["sqnr_db"] is None
    assert report.table(120).splitlines()[5].endswith(" -")


def test_json_holds_everything() -> None:
    report = olive.report(quantized("mixtral"))
    values = json.loads(report.json(indent=2))
    assert values == report.to_dict()
    assert values["bits_per_weight"] == report.bits_per_weight
    assert values["layers"][0]["bits_per_weight"] == report.layers[0].bits_per_weight
    assert {"name": "lm_head", "parameters": 97 * 96, "reason": 'skip holds "lm_head"'} in values["skipped"]


def test_an_exact_weight_is_null_in_json() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    nn.init.zeros_(model[0].weight)
    report = olive.report(olive.quantize(model))
    assert report.layers[0].sqnr_db == math.inf
    assert report.to_dict()["layers"][0]["sqnr_db"] == math.inf
    assert json.loads(report.json())["layers"][0]["sqnr_db"] is None
    assert "exact" in report.table()


def test_repr_is_one_line() -> None:
    report = olive.report(olive.quantize(models.plain()))
    assert repr(report).startswith("Report(Sequential: 2 quantized weights, ")
    assert "\n" not in repr(report)
    assert isinstance(report, Report) and isinstance(report.layers[0], LayerReport)


def test_float_model_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"model: expected a model with quantized layers, got none"):
        olive.report(models.plain())


def test_no_module_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        olive.report({})  # type: ignore[arg-type]


def test_meta_device_is_rejected() -> None:
    model = copy.deepcopy(olive.quantize(models.plain())).to("meta")
    with pytest.raises(ValueError, match=r"0: expected a weight with values, got one on the meta device"):
        olive.report(model)


def test_eight_bits_and_activations(tmp_path: Path) -> None:
    model = models.plain()
    config = olive.QuantConfig(bits=8, group_size=32, activations="ovp8", activation_group_size=0)
    olive.quantize(model, config, calibration=[torch.randn(40, 96)])
    report = olive.report(model)
    assert report.model_bytes == stored_bytes(model)
    for layer, index in zip(report.layers, (0, 3), strict=True):
        weight = model[index]
        codes, scale, _ = weight.canonical()
        assert (layer.codebook, layer.bits, layer.plain_share) == ("ovp8", 8, 0.0)
        assert layer.size_bytes == codes.numel() + 2 * scale.numel()
        assert 8 < layer.bits_per_weight < 9
        outliers = sum(
            0x80 in pair for line in codes.tolist() for pair in zip(line[::2], line[1::2], strict=True)
        )
        assert layer.outlier_share == pytest.approx(outliers / (codes.numel() // 2))
        figures = weight.activation_figures
        assert layer.activations == "ovp8 tensor"
        assert layer.activation_sqnr_db == figures.sqnr_db > 30
        assert layer.activation_outlier_share == figures.outlier_share
        assert layer.activation_clipped_share == figures.clipped_share
    values = json.loads(report.json())
    assert values["layers"][0]["activation_sqnr_db"] == report.layers[0].activation_sqnr_db
    page = report.html(tmp_path / "page.html").read_text()
    assert "Inputs of quantized layers" in page and "ovp8 tensor" in page
    assert "Inputs of quantized layers" in report.table(60) and "ovp8 tensor" in report.table(60)


def test_activations_without_data_and_without_loss(tmp_path: Path) -> None:
    model = olive.quantize(models.plain(), olive.QuantConfig(activations="ovp4", activation_group_size=64))
    report = olive.report(model)
    assert report.layers[0].activations == "ovp4 int4 64"
    assert report.layers[0].activation_sqnr_db is None and report.layers[0].activation_clipped_share is None
    line = next(line for line in report.table(100).splitlines() if "ovp4 int4 64" in line)
    assert line.split()[-3:] == ["-", "-", "-"]
    assert "<td>ovp4 int4 64</td>" in report.html(tmp_path / "page.html").read_text()
    exact = models.plain()
    olive.quantize(exact, olive.QuantConfig(activations="int8"), calibration=[torch.zeros(3, 96)])
    assert olive.report(exact).layers[0].activation_sqnr_db == math.inf
    assert json.loads(olive.report(exact).json())["layers"][0]["activation_sqnr_db"] is None


def test_weights_alone_show_no_activations(tmp_path: Path) -> None:
    report = olive.report(olive.quantize(models.plain()))
    assert report.layers[0].activations is None and report.layers[0].bits == 4
    assert "Inputs" not in report.table()
    assert "Inputs" not in report.html(tmp_path / "page.html").read_text()
