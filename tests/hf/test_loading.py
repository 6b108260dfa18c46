"""Loading of stored checkpoints, and quantizing while loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import olive
from olive.nn import OVPExperts, OVPLinear, OVPWeight
from tests import models
from tests.hf.tiny import logits, same_tensors, tiny_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARCHITECTURES = ["gpt2", "bert", "bart", "mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_loaded_and_quantized_while_loading_are_the_same(name: str, tmp_path: Path) -> None:
    model: Any = models.build(name)
    model.save_pretrained(tmp_path / "float")
    olive.quantize(model)
    model.save_pretrained(tmp_path / "stored", max_shard_size="60KB")
    loaded = type(model).from_pretrained(tmp_path / "stored")
    assert same_tensors(model, loaded)
    assert torch.equal(models.logits(model), models.logits(loaded))
    on_load = type(model).from_pretrained(tmp_path / "float", quantization_config=olive.QuantConfig())
    assert same_tensors(model, on_load)
    assert torch.equal(models.logits(model), models.logits(on_load))
    assert any(isinstance(m, OVPExperts) for m in loaded.modules()) == (
        name in ("mixtral", "qwen3_moe", "gpt_oss")
    )
    kinds = [[type(m) for m in one.modules()] for one in (model, loaded, on_load)]
    assert kinds[0] == kinds[1] == kinds[2]
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(model, type(model).from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(config: olive.QuantConfig, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_llama().save_pretrained(tmp_path / "float32")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    llama.save_pretrained(tmp_path / "float")
    olive.quantize(llama, config).save_pretrained(tmp_path / "stored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")  # "auto" is the default
    on_load = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype="auto", quantization_config=config
    )
    for other in (loaded, on_load):
        assert other.dtype == dtype
        assert other.model.layers[0].mlp.up_proj.dtype == dtype
        assert same_tensors(llama, other)
        assert torch.equal(logits(llama), logits(other))


def test_weights_are_cast_before_they_are_quantized(
    llama: nn.Module, config: olive.QuantConfig, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    later = olive.quantize(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), config)
    assert same_tensors(later, on_load)


def test_a_stored_checkpoint_loads_in_another_dtype(llama: nn.Module, stored: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float16)
    assert loaded.lm_head.weight.dtype == loaded.model.layers[0].self_attn.q_proj.bias.dtype == torch.float16
    codes = {key: value for key, value in llama.state_dict().items() if not value.is_floating_point()}
    assert codes
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in codes.items())


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(
    stored: Path, llama: nn.Module, config: olive.QuantConfig, tmp_path: Path, device_map: Any
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(stored, device_map=device_map)
    assert torch.equal(logits(llama), logits(loaded))
    tiny_llama().save_pretrained(tmp_path / "float")
    on_load = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", device_map=device_map, quantization_config=config
    )
    assert same_tensors(llama, on_load)


def test_loaded_models_know_their_quality(stored: Path, llama: nn.Module) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(stored)
    for name, weight in llama.named_modules():
        if isinstance(weight, OVPWeight):
            assert weight.sqnr_db is not None
            assert 10 < weight.sqnr_db < 40
            assert abs(loaded.get_submodule(name).sqnr_db - weight.sqnr_db) < 1e-3


def test_the_bare_model_of_a_stored_checkpoint(stored: Path, llama: nn.Module) -> None:
    bare = AutoModel.from_pretrained(stored)
    assert same_tensors(bare, llama.model)


def test_a_new_head_on_a_stored_checkpoint_stays_float(stored: Path, llama: nn.Module) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(stored, num_labels=3, pad_token_id=0)
    assert isinstance(classifier.score, nn.Linear)
    assert same_tensors(classifier.model, llama.model)


def test_a_head_that_the_checkpoint_lacks_stays_float(config: olive.QuantConfig, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float", num_labels=3, pad_token_id=0, quantization_config=config
    )
    assert isinstance(classifier.score, nn.Linear)
    assert classifier.score.weight.requires_grad
    assert isinstance(classifier.model.layers[0].mlp.up_proj, OVPLinear)
    classifier.save_pretrained(tmp_path / "stored")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stored")
    assert same_tensors(classifier, again)


def test_a_full_head_on_a_bare_checkpoint(
    config: olive.QuantConfig, llama: nn.Module, tmp_path: Path
) -> None:
    olive.quantize(llama, config)
    llama.model.save_pretrained(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_tensors(full.model, llama.model)


def test_a_state_dict_instead_of_files(stored: Path, llama: nn.Module) -> None:
    settings = transformers.AutoConfig.from_pretrained(stored)
    state = {key: value.clone() for key, value in llama.state_dict().items()}
    loaded = transformers.LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=dict(state))
    assert same_tensors(llama, loaded)
    for name in ("model.layers.1.mlp.up_proj.scale", "model.layers.0.self_attn.q_proj.bias"):
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=rf"{name}: expected in the state dict"):
            transformers.LlamaForCausalLM.from_pretrained(None, config=settings, state_dict=part)


def test_nan_in_a_checkpoint_is_named(llama: nn.Module, config: olive.QuantConfig, tmp_path: Path) -> None:
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[3, 7] = float("nan")
    llama.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: expected finite values, got nan"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_nan_in_an_expert_is_named(config: olive.QuantConfig, tmp_path: Path) -> None:
    model: Any = models.build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 3, 7] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.experts\.down_proj\[2\]: expected finite values"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_with_nothing_to_quantize(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    everything = olive.QuantConfig(skip=("lm_head", "*_proj"))
    with pytest.raises(
        ValueError, match="quantization_config: expected at least one layer that can be quantized"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=everything)


def test_a_name_in_skip_that_the_model_does_not_have(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"skip: expected names of modules in the model, got 'lmhead'"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=olive.QuantConfig(skip=("lmhead",))
        )


@pytest.mark.parametrize("device", ["disk", "cpu"])
def test_weights_that_a_device_map_moves_away(config: olive.QuantConfig, tmp_path: Path, device: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    device_map = {"model": device, "lm_head": "cpu" if device == "disk" else "meta"}
    with pytest.raises(
        ValueError, match=r"device_map: expected one device, or several GPUs, while quantizing"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=device_map)


def test_a_device_map_that_transformers_makes_is_checked_when_it_is_known(
    config: olive.QuantConfig, llama: nn.Module
) -> None:
    from olive.hf.loading import QuantizeOnLoad

    llama.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map: expected one device"):
        QuantizeOnLoad(llama, config, []).finish(llama)


def test_part_of_the_experts_is_missing(config: olive.QuantConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    models.build("gpt_oss").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: expected in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_missing_bias_is_initialised_as_transformers_does(
    llama: nn.Module, config: olive.QuantConfig, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    llama.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.bias, torch.zeros(64))
