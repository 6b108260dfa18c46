"""What saved files hold, and how the state dict streams."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import olive
from olive.hf.saving import StoredOnDemand, streaming_state_dict
from olive.hf.stored import SAVE_ID
from olive.nn import OVPWeight
from tests.hf.tiny import logits, same_tensors, tiny_llama


def headers(path: Path) -> dict[str, dict[str, Any]]:
    """Tensors of all files in a folder by name, read from the bytes of the safetensors headers."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        header.pop("__metadata__")
        assert not set(header) & set(found), "a tensor is stored twice"
        found.update(header)
    return found


def size(header: dict[str, Any]) -> int:
    begin, end = header["data_offsets"]
    return int(end - begin)


def test_a_weight_takes_4_125_bits_in_groups_of_128(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256, num_attention_heads=2)
    olive.quantize(model).save_pretrained(tmp_path, max_shard_size="50KB")
    stored = headers(tmp_path)
    layers = {name.removesuffix(".codes") for name in stored if name.endswith(".codes")}
    assert len(layers) == 14
    values = bits = 0
    for name in layers:
        weight = model.get_submodule(name)
        assert isinstance(weight, OVPWeight)
        values += weight.out_features * weight.in_features
        bits += 8 * (size(stored[f"{name}.codes"]) + size(stored[f"{name}.scale"]))
        assert size(stored[f"{name}.codebook"]) == 32
        assert f"{name}.weight" not in stored
    assert bits == 4.125 * values
    kinds = {name.rpartition(".")[2]: header["dtype"] for name, header in stored.items()}
    assert (kinds["codes"], kinds["scale"], kinds["codebook"]) == ("U8", "I16", "I8")


def test_shards_load_to_the_same_model(llama: nn.Module, config: olive.QuantConfig, tmp_path: Path) -> None:
    olive.quantize(llama, config).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_tensors(llama, loaded)
    assert torch.equal(logits(llama), logits(loaded))


def test_every_file_of_a_save_has_its_id(llama: nn.Module, config: olive.QuantConfig, tmp_path: Path) -> None:
    olive.quantize(llama, config)
    ids = []
    for name in ("one", "two"):
        llama.save_pretrained(tmp_path / name, max_shard_size="20KB")
        expected = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["save_id"]
        for file in (tmp_path / name).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt", SAVE_ID: expected}
        ids.append(expected)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("skip", [("lm_head",), ()])
def test_tied_embeddings_are_stored_once_and_stay_tied(skip: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    olive.quantize(model, olive.QuantConfig(group_size=32, skip=skip)).save_pretrained(tmp_path)
    assert [name for name, header in headers(tmp_path).items() if header["shape"] == [61, 64]] == [
        "model.embed_tokens.weight"
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_tensors(model, loaded)


def test_experts_keep_the_names_of_the_model(tmp_path: Path) -> None:
    from tests import models

    model = olive.quantize(models.build("mixtral"))
    model.save_pretrained(tmp_path)
    assert set(headers(tmp_path)) == set(model.state_dict())
    assert headers(tmp_path)["model.layers.0.mlp.experts.gate_up_proj.codes"]["shape"] == [4, 384, 48]


def test_a_dequantized_model_is_saved_like_any_other(tmp_path: Path) -> None:
    from tests import models

    model = models.build("mixtral")
    model.save_pretrained(tmp_path / "before")
    olive.dequantize(olive.quantize(model)).save_pretrained(tmp_path / "after")
    assert set(headers(tmp_path / "after")) == set(headers(tmp_path / "before"))
    assert "quantization_config" not in json.loads((tmp_path / "after" / "config.json").read_text())
    assert same_tensors(model, type(model).from_pretrained(tmp_path / "after"))


def test_saving_over_the_folder_it_came_from(stored: Path, llama: nn.Module) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(stored)
    loaded.save_pretrained(stored)
    assert same_tensors(llama, AutoModelForCausalLM.from_pretrained(stored))
    assert torch.equal(logits(llama), logits(loaded))


def test_the_streaming_state_dict_holds_no_copies(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    plain, streaming = llama.state_dict(), streaming_state_dict(llama)
    assert list(plain) == list(streaming)
    on_demand = {name for name, tensor in streaming.items() if isinstance(tensor, StoredOnDemand)}
    packed = {
        name for name, module in llama.named_modules() if isinstance(module, OVPWeight) and module.is_packed
    }
    assert on_demand == {f"{name}.{field}" for name in packed for field in ("codes", "scale")}
    assert packed
    own = {parameter.untyped_storage().data_ptr() for parameter in llama.parameters()}
    for name, tensor in streaming.items():
        assert tensor.untyped_storage().data_ptr() in own
        assert tensor.device == plain[name].device
        assert tensor.dtype == plain[name].dtype
        assert tensor.shape == plain[name].shape
        assert type(tensor.contiguous()) is torch.Tensor
        assert torch.equal(tensor, plain[name])
        assert torch.equal(tensor + 1, plain[name] + 1)


def test_state_dicts_are_plain_again_after_saving(stored: Path, llama: nn.Module) -> None:
    assert not any(isinstance(tensor, StoredOnDemand) for tensor in llama.state_dict().values())


def test_saving_a_model_with_an_adapter_saves_the_adapter_only(
    llama: nn.Module, config: olive.QuantConfig, tmp_path: Path
) -> None:
    from peft import LoraConfig

    from olive.hf.peft import with_quantized_layers

    olive.quantize(llama, config)
    llama.add_adapter(with_quantized_layers(LoraConfig(r=2, target_modules=["q_proj"])))
    llama.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert all("lora_" in name for name in headers(tmp_path))


def test_generation_config_is_saved_too(stored: Path) -> None:
    assert (stored / "generation_config.json").exists()
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(stored).generation_config, transformers.GenerationConfig
    )
