"""Converted models are saved and loaded bit for bit; damaged checkpoints are errors that name the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
)

from olive.hf.qat_config import OliveQATConfig
from olive.nn import UniformConv2d, UniformEmbedding, UniformLinear
from olive.qat import QATConfig, convert, prepare
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.attention import QATAttention
from tests import models
from tests.hf.test_bad_checkpoints import edit_config, edit_tensors
from tests.hf.tiny import same_tensors
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train

QKR = QATConfig(2, 4, qkr=True, activation_granularity="per_token", activation_offsets=True)
Batch = dict[str, Tensor]
Case = tuple[Callable[[], nn.Module], Callable[[], Batch], QATConfig, Any]
CASES: dict[str, Case] = {
    "vit": (tiny_vit, images, QKR, AutoModelForImageClassification),
    "vit, weights alone": (
        tiny_vit,
        images,
        QATConfig(3, None, "lsq", first_last_bits=None),
        AutoModelForImageClassification,
    ),
    "vit, attention": (
        tiny_vit,
        images,
        QATConfig(2, 2, "lsq", quantize_attention=True),
        AutoModelForImageClassification,
    ),
    "bert": (models.bert, tokens, QATConfig(4, 8, group_size=16), AutoModelForMaskedLM),
    "bert, qkr": (models.bert, tokens, QATConfig(2, None, qkr=True), AutoModelForMaskedLM),
    "llama tied": (tiny_llama, tokens, QATConfig(4, 8), AutoModelForCausalLM),
    "llama, attention": (
        tiny_llama,
        tokens,
        QATConfig(4, 4, activation_offsets=True, quantize_attention=True),
        AutoModelForCausalLM,
    ),
    "gpt2": (models.gpt2, tokens, QATConfig(3, 4, "lsq", activation_offsets=True), AutoModelForCausalLM),
}


def converted(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch]:
    make, batch, config, _ = CASES[name]
    model = make()
    angles = [(module, module.inv_freq) for module in model.modules() if hasattr(module, "inv_freq")]
    model.to(dtype)
    for module, frequencies in angles:
        module.inv_freq = frequencies  # float32, as in a model that is loaded in another dtype
    data = {key: one.to(dtype) if one.is_floating_point() else one for key, one in batch().items()}
    prepare(model, config, batch=data)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, 2)
    return convert(model.eval()), data


def logits(model: nn.Module, data: Batch) -> Tensor:
    with torch.no_grad():
        return model(**data).logits


@pytest.mark.parametrize("name", list(CASES))
def test_loaded_models_are_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, data = converted(name)
    expected = logits(model, data)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, data), expected)
    loaded = CASES[name][3].from_pretrained(tmp_path)
    assert same_tensors(model, loaded)
    assert torch.equal(logits(loaded, data), expected)
    assert loaded.is_quantized and loaded.quantization_method == "olive_qat"
    assert [type(one).__name__ for one in loaded.modules()] == [type(one).__name__ for one in model.modules()]
    loaded.save_pretrained(tmp_path / "again")
    again = CASES[name][3].from_pretrained(tmp_path / "again")
    assert same_tensors(model, again)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_files_are_as_small_as_the_codes(tmp_path: Path) -> None:
    model, _ = converted("llama tied")
    model.save_pretrained(tmp_path)
    stored = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    assert stored <= (tmp_path / "model.safetensors").stat().st_size <= stored + 20_000  # names
    whole = sum(one.numel() * 4 for one in tiny_llama().parameters())
    assert stored < 0.5 * whole


@pytest.mark.parametrize("name", ["vit", "llama tied", "bert"])
def test_many_files(name: str, tmp_path: Path) -> None:
    model, data = converted(name)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = CASES[name][3].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, data), logits(model, data))


@pytest.mark.parametrize("name", ["vit", "llama tied", "gpt2"])
def test_bare_model_loads_the_checkpoint_of_one_with_a_head(name: str, tmp_path: Path) -> None:
    model, data = converted(name)
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert any(isinstance(one, UniformLinear) for one in bare.modules())
    inputs = {key: one for key, one in data.items() if key != "labels"}
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(bare(**inputs).last_hidden_state, expected)


def test_generation_from_a_loaded_model(tmp_path: Path) -> None:
    model, data = converted("llama, attention")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = data["input_ids"][:2, :4]
    expected = model.generate(prompt, **arguments)
    assert torch.equal(loaded.generate(prompt, **arguments), expected)
    assert expected.shape == (2, 10)


@pytest.mark.parametrize("name", ["vit", "llama tied"])
def test_bfloat16_keeps_float32_scales(name: str, tmp_path: Path) -> None:
    model, _ = converted(name)
    model.save_pretrained(tmp_path)
    loaded = CASES[name][3].from_pretrained(tmp_path, dtype=torch.bfloat16)
    scales = [
        tensor
        for module in loaded.modules()
        if isinstance(module, (UniformLinear, ActivationQuantizer))
        for field, tensor in (*module._buffers.items(), *module._parameters.items())
        if tensor is not None and tensor.is_floating_point() and field != "bias"
    ]
    assert scales and all(one.dtype == torch.float32 for one in scales)
    assert all(
        module.bias.dtype == torch.bfloat16
        for module in loaded.modules()
        if isinstance(module, UniformLinear) and module.bias is not None
    )
    data = CASES[name][1]()
    data = {key: one.bfloat16() if one.is_floating_point() else one for key, one in data.items()}
    got = logits(loaded, data)
    assert got.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "half")
    again = CASES[name][3].from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert same_tensors(loaded, again) and torch.equal(logits(again, data), got)


@pytest.mark.parametrize("name", ["vit, attention", "llama tied"])
def test_models_trained_in_bfloat16(name: str, tmp_path: Path) -> None:
    model, data = converted(name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = CASES[name][3].from_pretrained(tmp_path, dtype="auto")
    assert same_tensors(model, loaded) and torch.equal(logits(loaded, data), logits(model, data))


def test_a_state_dict_may_be_given(tmp_path: Path) -> None:
    model, data = converted("llama tied")
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(logits(loaded, data), logits(model, data))


def test_two_models_of_one_config_do_not_both_look_converted() -> None:
    first = tiny_llama()
    second = transformers.LlamaForCausalLM(first.config)
    convert(prepare(first, QATConfig(4)))
    assert not hasattr(second.config, "quantization_config")
    assert not getattr(second, "is_quantized", False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stored")
    converted("vit")[0].save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(stored: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in stored.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


LAYER, ATTENTION = "vit.layers.0.mlp.fc1", "vit.layers.1.attention"
Tensors = dict[str, Tensor]


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


MISSING = [
    f"{LAYER}.codes",
    f"{LAYER}.scale",
    f"{LAYER}.bias",
    f"{LAYER}.input_scale",
    f"{LAYER}.input_offset",
    "vit.embeddings.patch_embeddings.projection.packed.codes",
    f"{ATTENTION}.merged_weight.packed.codes",
    f"{ATTENTION}.merged_weight.bias_of_keys",
    f"{ATTENTION}.value_quantizer.scale",
    f"{ATTENTION}.value_quantizer.signed",
    f"{ATTENTION}.value_quantizer.offset",
]
SCALE = f"{ATTENTION}.key_quantizer.scale"
FILES: dict[str, tuple[Callable[[Tensors], object], type[Exception], str]] = {
    **{
        f"missing {one}": (without(one), ValueError, rf"{one}: expected in the checkpoint") for one in MISSING
    },
    "signed codes": (
        put(f"{LAYER}.codes", lambda one: one.view(torch.int8)),
        TypeError,
        rf"{LAYER}\.codes: expected uint8, got int8 in .*model\.safetensors",
    ),
    "bfloat16 scale": (
        put(f"{LAYER}.scale", lambda one: one.bfloat16()),
        TypeError,
        rf"{LAYER}\.scale: expected float32, got bfloat16",
    ),
    "float16 input scale": (
        put(f"{LAYER}.input_scale", lambda one: one.half()),
        TypeError,
        rf"{LAYER}\.input_scale: expected float32, got float16",
    ),
    "integer scale": (
        put(SCALE, lambda one: one.to(torch.int16)),
        TypeError,
        r"key_quantizer\.scale: expected float32 or float16 or bfloat16, got int16",
    ),
    "fewer rows": (
        put(f"{LAYER}.codes", lambda one: one[:-1]),
        ValueError,
        rf"{LAYER}\.codes: expected shape \(48, 8\), got \(47, 8\)",
    ),
    "more columns": (
        put(f"{LAYER}.codes", lambda one: torch.cat((one, one), 1)),
        ValueError,
        r"expected shape \(48, 8\), got \(48, 16\)",
    ),
    "flat scale": (
        put(f"{LAYER}.scale", lambda one: one[:, 0]),
        ValueError,
        r"expected shape \(48, 1\), got \(48,\)",
    ),
    "fewer positions": (
        put(SCALE, lambda one: one[:-1]),
        ValueError,
        r"key_quantizer\.scale: expected shape \(20,\), got \(19,\)",
    ),
    "negative scale": (
        put(f"{LAYER}.scale", lambda one: -one),
        ValueError,
        rf"{LAYER}\.scale: expected finite scales of at least 0",
    ),
    "nan": (
        put(f"{LAYER}.input_offset", lambda one: one * float("nan")),
        ValueError,
        rf"{LAYER}\.input_offset: expected finite values, got NaN",
    ),
    "zero scale": (
        put(SCALE, lambda one: one * 0),
        ValueError,
        r"key_quantizer\.scale: expected finite values, not all 0, got others",
    ),
    "nan scale": (
        put(SCALE, lambda one: one * float("nan")),
        ValueError,
        r"key_quantizer\.scale: expected finite values, not all 0, got others",
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_damaged_files_are_refused(name: str, checkpoint: Path) -> None:
    change, error, words = FILES[name]
    edit_tensors(checkpoint, change)
    with pytest.raises(error, match=words):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_a_file_that_ends_early_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        AutoModelForImageClassification.from_pretrained(checkpoint)


Config = dict[str, Any]


def layer(**more: Any) -> Callable[[Config], object]:
    return lambda config: config["layers"][LAYER].update(more)


def attention(change: Callable[[Config], object]) -> Callable[[Config], object]:
    return lambda config: change(config["layers"][ATTENTION])


CONFIGS: dict[str, tuple[Callable[[Config], object], type[Exception], str]] = {
    "newer": (lambda c: c.update(format_version=2), ValueError, "format_version: expected at most 1, got 2"),
    "no version": (lambda c: c.pop("format_version"), ValueError, r"quantization_config\.format_version"),
    "unknown field of the config": (
        lambda c: c.update(colour="red"),
        ValueError,
        r"quantization_config: expected layers and format_version, got .*colour",
    ),
    "no layers": (lambda c: c.pop("layers"), ValueError, "expected layers and format_version, got"),
    "layers of another type": (
        lambda c: c.update(layers=[1]),
        TypeError,
        r"quantization_config\.layers: expected an object of objects, got \[1\]",
    ),
    "kind": (
        layer(kind="conv3d"),
        ValueError,
        rf"layers\.{LAYER}: expected kind linear, embedding, conv2d or attention, got 'conv3d'",
    ),
    "unknown field": (layer(colour="red"), ValueError, rf"{LAYER}: expected fields .* \['colour'\] unknown"),
    "missing field": (
        lambda c: c["layers"][LAYER].pop("bits"),
        ValueError,
        rf"{LAYER}: expected fields .*, got \['bits'\] missing",
    ),
    "bits out of range": (layer(bits=9), ValueError, rf"{LAYER}: bits: expected 1 to 8, got 9"),
    "other bits": (layer(bits=4), ValueError, rf"{LAYER}\.codes: expected shape \(48, 16\), got \(48, 8\)"),
    "other size": (
        layer(in_features=33),
        ValueError,
        rf"{LAYER}: expected a layer of the model's size, Linear \(48, 32\), got \(48, 33\)",
    ),
    "layer left out": (
        lambda c: c["layers"].pop(LAYER),
        ValueError,
        rf"layers: expected the layer of {LAYER}\.codes, got none in config\.json",
    ),
    "unknown layer": (
        lambda c: c["layers"].update({"vit.layers.7.mlp.fc1": c["layers"][LAYER]}),
        ValueError,
        r"expected the names of this model's layers, got 'vit\.layers\.7\.mlp\.fc1', which a ViTForImage",
    ),
    "unknown field of attention": (
        attention(lambda c: c.update(colour="red")),
        ValueError,
        rf"{ATTENTION}: expected fields .* \['colour'\] unknown",
    ),
    "no quantizers": (
        attention(lambda c: c.pop("quantizers")),
        ValueError,
        rf"{ATTENTION}: expected fields .*, got \['quantizers'\] missing",
    ),
    "unknown quantizer": (
        attention(lambda c: c["quantizers"].update(mask_quantizer={})),
        ValueError,
        rf"{ATTENTION}: expected quantizers among .*, got unknown \['mask_quantizer'\]",
    ),
    "unknown field of a quantizer": (
        attention(lambda c: c["quantizers"]["key_quantizer"].update(colour="red")),
        ValueError,
        rf"{ATTENTION}: expected fields .* \['colour'\] unknown",
    ),
    "projection left out": (
        attention(lambda c: c["layers"].pop("v_proj")),
        ValueError,
        rf"{ATTENTION}: expected fields .*, got \['v_proj'\] missing",
    ),
    "other merged size": (
        attention(lambda c: c["layers"]["merged_weight"].update(in_features=31)),
        ValueError,
        rf"{ATTENTION}: merged_weight: expected \(128, 32\), got \(128, 31\)",
    ),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_damaged_configs_are_refused(name: str, checkpoint: Path) -> None:
    change, error, words = CONFIGS[name]
    edit_config(checkpoint, change)
    with pytest.raises(error, match=words):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_no_name_of_the_model_is_refused(checkpoint: Path) -> None:
    values = transformers.AutoConfig.from_pretrained(checkpoint).quantization_config
    config = tiny_llama().config
    config.quantization_config = values
    with pytest.raises(ValueError, match=r"got 'classifier', which a LlamaForCausalLM does not have"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_config_of_another_method_is_refused() -> None:
    values = OliveQATConfig({}).to_dict()
    assert OliveQATConfig.from_dict(values).to_dict() == values
    assert OliveQATConfig.from_dict(values, return_unused_kwargs=True, a=1)[1] == {"a": 1}
    with pytest.raises(ValueError, match="quant_method: expected 'olive_qat', got 'awq'"):
        OliveQATConfig.from_dict({**values, "quant_method": "awq"})


def test_kinds_of_layers(stored: Path) -> None:
    """Of a ViT: a convolution, an attention, linear layers; of a Llama a table."""
    kinds = {
        one["kind"]
        for one in json.loads((stored / "config.json").read_text())["quantization_config"]["layers"].values()
    }
    assert kinds == {"conv2d", "attention", "linear"}
    loaded = AutoModelForImageClassification.from_pretrained(stored)
    found = {type(one) for one in loaded.modules()}
    assert UniformConv2d in found and any(issubclass(one, QATAttention) for one in found)
    model, _ = converted("llama tied")
    assert isinstance(model.get_input_embeddings(), UniformEmbedding)
