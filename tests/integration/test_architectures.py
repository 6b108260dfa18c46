"""Real architectures from tiny configs: what is quantized, what is not and why, and what it computes."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch import nn

import olive
from olive.walk import EMBEDDING, VECTORS, walk
from tests import models

LLAMA = [f"self_attn.{key}_proj" for key in "qkvo"] + [f"mlp.{key}_proj" for key in ("gate", "up", "down")]
ATTENTION = LLAMA[:4]
BART = [f"self_attn.{key}_proj" for key in ("k", "v", "q", "out")] + ["fc1", "fc2"]
BART_DECODER = BART + [f"encoder_attn.{key}_proj" for key in ("k", "v", "q", "out")]

# Modules quantized by default; experts stand for their two stacks.
QUANTIZED = {
    "llama": [f"model.layers.0.{key}" for key in LLAMA],
    "qwen3": [f"model.layers.0.{key}" for key in LLAMA],
    "gemma2": [f"model.layers.0.{key}" for key in LLAMA],
    "gemma3": [f"model.layers.0.{key}" for key in LLAMA],
    "opt": ["model.decoder.project_in", "model.decoder.project_out"]
    + [f"model.decoder.layers.0.{key}" for key in BART],
    "gpt2": [f"transformer.h.0.{key}" for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    "bloom": [
        f"transformer.h.0.{key}"
        for key in (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    ],
    "bert": [
        f"bert.encoder.layer.0.{key}"
        for key in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    + ["cls.predictions.transform.dense"],
    "bart": [f"model.encoder.layers.0.{key}" for key in BART]
    + [f"model.decoder.layers.0.{key}" for key in BART_DECODER],
    "vit": [f"vit.layers.0.attention.{key}_proj" for key in "qkvo"]
    + ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2", "classifier"],
    "mixtral": [f"model.layers.0.{key}" for key in [*ATTENTION, "mlp.experts"]],
    "qwen3_moe": [f"model.layers.0.{key}" for key in [*ATTENTION, "mlp.experts"]],
    "gpt_oss": [f"model.layers.0.{key}" for key in [*ATTENTION, "mlp.experts"]],
    "llama4": [f"model.layers.0.{key}" for key in [*ATTENTION, "feed_forward.experts"]]
    + [f"model.layers.0.feed_forward.shared_expert.{key}_proj" for key in ("gate", "up", "down")],
    "nemotron_h": [f"model.layers.0.mixer.{key}_proj" for key in "qkvo"]
    + ["model.layers.1.mixer.experts"]
    + [f"model.layers.1.mixer.shared_experts.{key}_proj" for key in ("up", "down")],
}
TIED = "its weight is tied to {}"
HEAD = 'skip holds "lm_head"'
ROUTER = "not one of the classes that can be quantized"
# Everything else that holds a matrix or more, with the reason.
SKIPPED = {
    "llama": {"model.embed_tokens": EMBEDDING, "lm_head": HEAD},
    "qwen3": {"model.embed_tokens": EMBEDDING, "lm_head": TIED.format("model.embed_tokens.weight")},
    "gemma2": {"model.embed_tokens": EMBEDDING, "lm_head": TIED.format("model.embed_tokens.weight")},
    "gemma3": {"model.embed_tokens": EMBEDDING, "lm_head": TIED.format("model.embed_tokens.weight")},
    "opt": {
        "model.decoder.embed_tokens": EMBEDDING,
        "model.decoder.embed_positions": EMBEDDING,
        "lm_head": TIED.format("model.decoder.embed_tokens.weight"),
    },
    "gpt2": {
        "transformer.wte": EMBEDDING,
        "transformer.wpe": EMBEDDING,
        "lm_head": TIED.format("transformer.wte.weight"),
    },
    "bloom": {
        "transformer.word_embeddings": EMBEDDING,
        "lm_head": TIED.format("transformer.word_embeddings.weight"),
    },
    "bert": {
        **{f"bert.embeddings.{key}_embeddings": EMBEDDING for key in ("word", "position", "token_type")},
        "cls.predictions.decoder": TIED.format("bert.embeddings.word_embeddings.weight"),
    },
    "bart": {
        "model.shared": EMBEDDING,
        **{
            f"model.{part}.{key}": EMBEDDING
            for part in ("encoder", "decoder")
            for key in ("embed_tokens", "embed_positions")
        },
        "lm_head": TIED.format("model.shared.weight"),
    },
    "vit": {
        "vit.embeddings": "ViTEmbeddings: not one of the classes that can be quantized",
        "vit.embeddings.patch_embeddings.projection": "Conv2d: convolution kernels are not quantized",
    },
    "mixtral": {"model.embed_tokens": EMBEDDING, "model.layers.0.mlp.gate": ROUTER, "lm_head": HEAD},
    "qwen3_moe": {"model.embed_tokens": EMBEDDING, "model.layers.0.mlp.gate": ROUTER, "lm_head": HEAD},
    "gpt_oss": {"model.embed_tokens": EMBEDDING, "model.layers.0.mlp.router": ROUTER, "lm_head": HEAD},
    "llama4": {
        "model.embed_tokens": EMBEDDING,
        "model.layers.0.feed_forward.router": "Llama4Router: its forward is not that of Linear",
        "lm_head": HEAD,
    },
    "nemotron_h": {"model.embeddings": EMBEDDING, "model.layers.1.mixer.gate": ROUTER, "lm_head": HEAD},
}
every_architecture = pytest.mark.parametrize("name", models.ARCHITECTURES)


@every_architecture
def test_what_is_quantized_and_why_the_rest_is_not(name: str) -> None:
    model = models.build(name)
    sizes = {id(value): value.numel() for value in model.parameters()}
    expected = set(QUANTIZED[name])
    stacks = chain.from_iterable(
        [module.weight] if hasattr(module, "weight") else [p for p in module.parameters() if p.dim() == 3]
        for module in map(model.get_submodule, expected)
    )
    quantizable = sum(value.numel() for value in stacks)  # type: ignore[union-attr,misc]
    inventory = walk(model)
    assert {target.name for target in inventory.targets} == expected
    assert inventory.quantizable_values == quantizable
    assert inventory.total_values == sum(sizes.values())
    found = {skipped.name: skipped.reason for skipped in inventory.skipped if skipped.reason != VECTORS}
    assert set(found) == set(SKIPPED[name])
    for module, reason in SKIPPED[name].items():
        assert reason in found[module], module


@every_architecture
@pytest.mark.parametrize(
    "config", [olive.QuantConfig(), olive.QuantConfig(group_size=32)], ids=["g128", "g32"]
)
def test_quantized_model_computes_with_its_decoded_weights(name: str, config: olive.QuantConfig) -> None:
    model = models.build(name)
    before, inventory = models.logits(model), walk(model, config)
    assert olive.quantize(model, config) is model
    logits = models.logits(model)
    floats = olive.dequantize(copy.deepcopy(model))
    decoded = models.logits(floats)
    # Sums in another order, through all layers; the error of quantization is about 1000 times as large.
    assert bool(((logits - decoded).abs() <= 2e-4 * decoded.abs().max()).all())
    assert float((logits - before).abs().max()) > 1e-2
    again = walk(model)
    assert [target.name for target in again.quantized] == [target.name for target in inventory.targets]
    assert again.targets == () and again.skipped == inventory.skipped
    assert again.share == inventory.share and again.total_values == inventory.total_values
    assert_ties_hold(model)
    assert_ties_hold(floats)
    assert [type(module) for module in floats.modules()] == [
        type(module) for module in models.build(name).modules()
    ]


def assert_ties_hold(model: nn.Module) -> None:
    """Output and input embedding are one parameter wherever the config says so."""
    declared: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    assert bool(declared) == any("tied" in reason for reason in (s.reason for s in walk(model).skipped))
    for target, source in declared.items():
        assert model.get_parameter(target) is model.get_parameter(source)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])  # one for each kind of module
def test_weights_come_back_in_the_models_dtype(name: str) -> None:
    model = models.build(name, torch.bfloat16)
    expected = {key: (value.dtype, value.shape) for key, value in model.named_parameters()}
    olive.quantize(model)
    assert bool(torch.isfinite(models.logits(model)).all())
    olive.dequantize(model)
    assert {key: (value.dtype, value.shape) for key, value in model.named_parameters()} == expected
