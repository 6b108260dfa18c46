"""olive.quantize on transformers models: what it tells transformers, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import olive
from olive.walk import attached_config, walk
from tests import models

LEFT = {"qwen3": "o_proj", "gpt2": "attn.c_proj", "qwen3_moe": "self_attn"}


@pytest.mark.parametrize("name", LEFT)
def test_saved_and_loaded_model_is_the_same(name: str, tmp_path: Path) -> None:
    model = models.build(name)
    olive.quantize(model, olive.QuantConfig(group_size=32, skip=("lm_head", LEFT[name])))
    assert model.is_quantized and model.quantization_method == "olive"
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(models.logits(loaded), models.logits(model))
    found, expected = walk(loaded), walk(model)
    assert [target.name for target in found.quantized] == [target.name for target in expected.quantized]
    assert (found.skipped, found.share) == (expected.skipped, expected.share)
    decoded = models.logits(olive.dequantize(loaded))
    assert torch.equal(decoded, models.logits(olive.dequantize(model)))


def test_dequantize_takes_the_marks_away() -> None:
    model = models.build("qwen3")
    olive.dequantize(olive.quantize(model))
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert attached_config(model) is None


def test_a_transformers_model_inside_another_module_is_marked() -> None:
    model = nn.Sequential(models.build("vit"))
    olive.quantize(model)
    assert (
        model[0].is_quantized and attached_config(model[0]) == attached_config(model) == olive.QuantConfig()
    )


def test_a_model_quantized_by_another_method_is_refused() -> None:
    model = models.build("vit")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match="expected a model that is not quantized, got one quantized with bitsandb"
    ):
        olive.quantize(model)


def test_code_that_looks_at_a_weights_dtype_works() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=96, d_kv=24, d_ff=192, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    olive.quantize(model, olive.QuantConfig(group_size=32))
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        decoded = olive.dequantize(model)(input_ids=ids, decoder_input_ids=ids).logits
    assert bool(((logits - decoded).abs() <= 2e-4 * decoded.abs().max()).all())


def test_generation_works() -> None:
    model = olive.quantize(models.build("llama"))
    ids = models.inputs(model)["input_ids"]
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )  # type: ignore[operator]
    assert tokens.shape[1] > ids.shape[1] and torch.equal(tokens[:, : ids.shape[1]], ids)


def test_gradients_reach_the_embeddings_through_all_layers() -> None:
    model = olive.quantize(models.build("qwen3"))
    embeddings = model.get_input_embeddings()(models.inputs(model)["input_ids"]).detach()  # type: ignore[operator]
    floats = olive.dequantize(olive.quantize(models.build("qwen3")))
    gradients = []
    for one in (model, floats):
        leaf = embeddings.clone().requires_grad_()
        one(inputs_embeds=leaf).logits.square().sum().backward()
        gradients.append(leaf.grad)
    got, expected = gradients
    assert bool(((got - expected).abs() <= 1e-3 * expected.abs().max()).all())
