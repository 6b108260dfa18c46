"""LoRA adapters on a quantized model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import olive
from olive.hf.peft import OVPLoraLinear, with_quantized_layers
from olive.nn import OVPLinear
from tests.hf.tiny import logits

# PEFT reads an attribute that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def config() -> olive.QuantConfig:
    """Leaves some of the adapted layers float."""
    return olive.QuantConfig(group_size=32, skip=("lm_head", "down_proj"))


def adapted(model: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, with_quantized_layers(config))


def test_a_step_trains_the_adapter_and_nothing_else(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    model = adapted(llama)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, OVPLoraLinear)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    tokens = torch.arange(3, 20)[None]
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(
            parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in trainable
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_is_saved_and_loaded(llama: nn.Module, config: olive.QuantConfig, tmp_path: Path) -> None:
    olive.quantize(llama, config)
    llama.save_pretrained(tmp_path / "base")
    model = adapted(llama)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = type(llama).from_pretrained(tmp_path / "base")
    settings = with_quantized_layers(LoraConfig.from_pretrained(tmp_path / "adapter"))
    assert torch.equal(
        logits(PeftModel.from_pretrained(base, tmp_path / "adapter", config=settings)), expected
    )


def test_merging_needs_float_layers(llama: nn.Module, config: olive.QuantConfig) -> None:
    olive.quantize(llama, config)
    model = adapted(llama)
    expected = logits(model)
    with pytest.raises(NotImplementedError, match=r"merge: expected float layers.* call olive\.dequantize"):
        model.merge_and_unload()
    olive.dequantize(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, OVPLinear) for module in merged.modules())
    assert ((logits(merged) - expected).abs() <= 1e-4 * expected.abs().max()).all()
