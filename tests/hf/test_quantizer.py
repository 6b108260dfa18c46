"""Marking models quantized in memory, and what transformers then does with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import olive
from olive.hf.quantizer import mark_quantized, unmark_quantized
from olive.nn import OVPWeight
from tests.hf.tiny import logits, same_tensors, tiny_llama


def test_a_quantized_model_looks_like_a_loaded_one(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    assert llama.is_quantized
    assert llama.quantization_method == "olive"
    assert llama.hf_quantizer.is_trainable
    assert llama.hf_quantizer.is_compileable
    assert llama.hf_quantizer.is_serializable()
    assert not llama.hf_quantizer.is_qat_trainable
    assert llama.config.quantization_config.quant == config
    assert llama.config._is_quantized
    assert llama.model.config is llama.config


def test_two_models_of_one_config_are_told_apart(config: olive.QuantConfig, tmp_path: Path) -> None:
    one = tiny_llama()
    other = transformers.LlamaForCausalLM(one.config)
    shared = one.config
    olive.quantize(one, config)
    assert other.config is shared
    assert not hasattr(shared, "quantization_config")
    assert all(vars(m).get("config", one.config) is one.config for m in one.modules())
    other.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert same_tensors(other, again)


def test_unmarking_restores_everything(llama: nn.Module, config: olive.QuantConfig) -> None:
    before = set(vars(llama)), set(vars(llama.config))
    mark_quantized(llama, config)
    unmark_quantized(llama)
    assert (set(vars(llama)), set(vars(llama.config))) == before
    assert not getattr(llama, "is_quantized", False)


def test_kept_weight_conversions_come_back(llama: nn.Module, config: olive.QuantConfig) -> None:
    conversions = ["anything"]
    llama._weight_conversions = conversions
    mark_quantized(llama, config)
    mark_quantized(llama, config)
    assert llama._weight_conversions == []
    unmark_quantized(llama)
    assert llama._weight_conversions is conversions


def test_a_model_of_another_library_is_left_alone(config: olive.QuantConfig) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = dict(vars(model))
    mark_quantized(model, config)
    unmark_quantized(model)
    assert vars(model) == before


def test_unmarking_keeps_the_mark_of_another_method(llama: nn.Module) -> None:
    llama.quantization_method = "bitsandbytes"
    llama.is_quantized = True
    llama.config.quantization_config = {"quant_method": "bitsandbytes"}
    unmark_quantized(llama)
    assert llama.is_quantized
    assert llama.quantization_method == "bitsandbytes"
    assert llama.config.quantization_config == {"quant_method": "bitsandbytes"}


def test_float_tensors_are_moved_to_aligned_memory(llama: nn.Module, config: olive.QuantConfig) -> None:
    bytes_ = torch.zeros(llama.lm_head.weight.nbytes + 4, dtype=torch.uint8)
    odd = bytes_.untyped_storage()
    values = llama.lm_head.weight.detach().clone()
    parameter = llama.lm_head.weight
    view = torch.empty(0).set_(odd, 1, values.shape)
    # A storage of its own at an odd address, as a mapped file gives it.
    import ctypes

    own = torch.frombuffer((ctypes.c_char * values.nbytes).from_address(view.data_ptr()), dtype=torch.float32)
    parameter.data = own.view_as(values).copy_(values)
    assert parameter.data_ptr() % 64
    mark_quantized(llama, config)
    assert llama.lm_head.weight is parameter
    assert parameter.data_ptr() % 64 == 0
    assert torch.equal(parameter, values)


def test_casting_leaves_codes_and_scales(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    before = {name: [t.clone() for t in w.canonical()] for name, w in weights(llama).items()}
    reference = logits(copy.deepcopy(llama).to(torch.float64).to(torch.float32))
    llama.to(torch.bfloat16)
    for name, weight in weights(llama).items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], weight.canonical(), strict=True))
    found = logits(llama)
    assert found.dtype == torch.bfloat16
    assert ((found.float() - reference).abs() <= 0.05 * reference.abs().max()).all()


def test_dequantize_of_the_model_itself(stored: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stored)
    before = logits(model)
    model.dequantize()
    assert not weights(model)
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    assert ((logits(model) - before).abs() <= 1e-5).all()
    model.half()  # refused by transformers as long as the model is marked


def weights(model: nn.Module) -> dict[str, OVPWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OVPWeight)}


@pytest.mark.parametrize("part", ["model", ""])
def test_an_inner_model_saves_by_itself(stored: Path, tmp_path: Path, part: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stored)
    inner = model.get_submodule(part)
    inner.save_pretrained(tmp_path / "inner")
    again = type(inner).from_pretrained(tmp_path / "inner")
    assert same_tensors(inner, again)
    model.save_pretrained(tmp_path / "outer")
    assert same_tensors(model, type(model).from_pretrained(tmp_path / "outer"))


def test_a_transformers_model_inside_another_module_saves_by_itself(
    config: olive.QuantConfig, tmp_path: Path
) -> None:
    outer = nn.Sequential(tiny_llama().model, nn.Linear(64, 3))
    olive.quantize(outer, config)
    outer[0].save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert same_tensors(outer[0], again)


def test_a_quantized_model_is_compiled_whole(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), logits(llama))
