"""`prepare`: which layers it exchanges, that parameters stay what they were, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import olive
from olive.qat import QATConfig, prepare, select
from olive.qat.layers import QATConv1D, QATConv2d, QATEmbedding, QATLayer, QATLinear
from olive.qat.preparation import prepared_config, quantizers
from olive.qat.weight_quantizers import LSQWeight, MinMax, StatsQ
from tests import models
from tests.qat.snapshots import snapshot, unchanged
from tests.qat.subjects import images, tiny_llama, tiny_vit

FULL = QATConfig(2, 4, activation_offsets=True)
VIT_BODY = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


def roles(model: nn.Module) -> dict[str, str]:
    """Quantized layers by name, and how many bits their weights have."""
    return {
        name: f"{'ends' if isinstance(one.weight_quantizer, MinMax) else 'body'} {one.weight_quantizer.bits}"
        for name, one in model.named_modules()
        if isinstance(one, QATLayer)
    }


def ends(model: nn.Module) -> set[str]:
    return {name for name, role in roles(model).items() if role.startswith("ends")}


def convolutions() -> nn.Sequential:
    """A plain network whose second convolution has groups."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 6, (3, 2), stride=2, padding=(1, 0)),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 12),
        nn.Linear(12, 5),
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "bert": models.bert,
    "gpt2": models.gpt2,
    "llama tied": tiny_llama,
    "llama": models.llama,
    "plain": models.plain,
    "convolutions": convolutions,
}


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "plain"])
def test_parameters_stay_the_same_objects_with_the_same_values(name: str, weights: str) -> None:
    model = MAKERS[name]()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {key: value.clone() for key, value in model.state_dict().items()}
    assert prepare(model, QATConfig(2, 4, weights, activation_offsets=True)) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[key] is value for key, value in before.items())
    new = set(after) - set(before)
    assert new and all(".input_quantizer." in key or ".weight_quantizer." in key for key in new)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in values.items())
    other = MAKERS[name]()
    missing = prepare(other, QATConfig(2, 4, weights, activation_offsets=True)).load_state_dict(
        values, strict=False
    )
    assert not missing.unexpected_keys and set(missing.missing_keys) == set(state) - set(values)


def test_parameters_stay_under_qkr_too() -> None:
    model = tiny_vit()
    before = dict(model.named_parameters())
    prepare(model, QATConfig(2, 2, qkr=True), batch=images())
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in before.items())
    trained = {key for key in before if not after[key].requires_grad}
    assert trained and all(key.endswith("k_proj.bias") for key in trained)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", {"vit.embeddings.patch_embeddings.projection", "classifier"}),
        ("bert", {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}),
        ("gpt2", {"transformer.wte", "lm_head"}),
        ("llama tied", {"model.embed_tokens", "lm_head"}),
        ("llama", {"model.embed_tokens", "lm_head"}),
        ("convolutions", {"0", "8"}),
    ],
)
def test_first_and_last_layers_have_eight_bits(name: str, expected: set[str]) -> None:
    model = prepare(MAKERS[name](), FULL)
    assert ends(model) == expected
    assert set(roles(model).values()) == {"ends 8", "body 2"}
    for end in expected:
        layer = model.get_submodule(end)
        if isinstance(layer, QATEmbedding):
            assert layer.input_quantizer is None
        else:
            assert layer.input_quantizer.bits == 8 and layer.input_quantizer.offset is None


def test_body_of_each_kind() -> None:
    vit = prepare(tiny_vit(), FULL)
    body = {name for name, role in roles(vit).items() if role == "body 2"}
    assert {name.rpartition(".")[2] for name in body} == VIT_BODY and len(body) == 12
    gpt2 = prepare(models.gpt2(), QATConfig(3, weights="lsq"))
    layer = gpt2.transformer.h[0].attn.c_attn
    assert isinstance(layer, QATConv1D) and isinstance(layer.weight_quantizer, LSQWeight)
    assert layer.weight_quantizer.scale.shape == (layer.nf,)
    llama = prepare(tiny_llama(), FULL)
    layer = llama.model.layers[0].mlp.down_proj
    assert isinstance(layer, QATLinear) and isinstance(layer.weight_quantizer, StatsQ)
    assert layer.input_quantizer.bits == 4 and layer.input_quantizer.offset.shape == (48,)


def test_a_tied_head_stays_tied() -> None:
    model = prepare(tiny_llama(), FULL)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.embed_tokens, QATEmbedding) and isinstance(model.lm_head, QATLinear)


def test_other_convolutions_are_left_alone() -> None:
    model = prepare(convolutions(), FULL)
    assert [type(one) for one in model] == [
        QATConv2d,
        nn.ReLU,
        nn.Conv2d,
        nn.Conv2d,
        nn.Conv2d,
        QATConv2d,
        nn.Flatten,
        QATLinear,
        QATLinear,
    ]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_none_leaves_first_and_last_layers_as_they_are() -> None:
    model = prepare(tiny_vit(), QATConfig(2, first_last_bits=None))
    assert ends(model) == set()
    assert type(model.classifier) is nn.Linear and len(roles(model)) == 12


def test_skip_leaves_layers_alone() -> None:
    model = prepare(tiny_vit(), QATConfig(2, skip=("fc1", "vit.layers.0.attention.*", "classifier")))
    assert [name for name in roles(model) if "layers.0" in name] == ["vit.layers.0.mlp.fc2"]
    assert type(model.classifier) is nn.Linear
    assert all("fc1" not in name for name in roles(model))


def test_a_whole_attention_can_be_skipped_under_qkr() -> None:
    model = tiny_vit()
    name = next(one for one, module in model.named_modules() if type(module).__name__ == "ViTAttention")
    prepare(model, QATConfig(2, 2, qkr=True, skip=(name,)), batch=images())
    assert type(model.get_submodule(name)).__name__ == "ViTAttention"


def test_one_submodule_of_a_model_can_be_prepared() -> None:
    model = nn.ModuleDict({"student": convolutions(), "other": nn.Linear(5, 5)})
    prepare(model["student"], FULL)
    assert type(model["other"]) is nn.Linear and prepared_config(model) is None
    assert prepared_config(model["student"]) == FULL


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_a_batch_sets_every_scale(granularity: str) -> None:
    model = tiny_vit().train()
    config = QATConfig(2, 2, activation_granularity=granularity, qkr=True)
    prepare(model, config, batch=images())
    assert all(one.is_initialized for one in quantizers(model).values())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    layer = model.vit.layers[0].mlp.fc1
    assert layer.input_quantizer.scale.shape == ((5,) if granularity == "per_token" else (1,))


@pytest.mark.parametrize("form", ["mapping", "tuple", "list", "tensor"])
def test_batches_come_in_every_form(form: str) -> None:
    images = torch.randn(2, 3, 8, 8)
    batch = {"mapping": {"input": images}, "tuple": (images,), "list": [images], "tensor": images}[form]
    model = prepare(convolutions(), FULL, batch=batch)
    assert all(one.is_initialized for one in quantizers(model).values())


def test_the_first_forward_pass_sets_what_no_batch_has_set() -> None:
    model = prepare(tiny_vit(), FULL)
    assert not any(one.is_initialized for one in quantizers(model).values())
    model(**images())
    assert all(one.is_initialized for one in quantizers(model).values())


def test_a_copy_of_a_prepared_model_computes_the_same() -> None:
    model = prepare(tiny_vit(), QATConfig(2, 2, qkr=True), batch=images()).eval()
    other = copy.deepcopy(model)
    assert prepared_config(other) == prepared_config(model)
    assert torch.equal(other(**images()).logits, model(**images()).logits)


def test_hooks_of_exchanged_layers_stay() -> None:
    model, calls = convolutions(), []
    handle = model[8].register_forward_hook(lambda *_: calls.append(1))
    prepare(model, FULL)
    model(torch.randn(1, 3, 8, 8))
    handle.remove()
    model(torch.randn(1, 3, 8, 8))
    assert calls == [1]


def rotary(**more: Any) -> nn.Module:
    return tiny_llama(tie_word_embeddings=False, **more)


def with_nan() -> nn.Module:
    model = tiny_vit()
    model.vit.layers[1].mlp.fc1.weight.data[3, 4] = float("nan")
    return model


def without_query() -> QATConfig:
    return QATConfig(2, 2, qkr=True, skip=("q_proj",))


def quantized() -> nn.Module:
    return olive.quantize(tiny_llama(), olive.QuantConfig(codebook="int4", method="paper"))


class Unreached(nn.Module):
    """A network with a layer that its forward passes over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(input))


def half_finite() -> dict[str, torch.Tensor]:
    batch = images()
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    return batch


Case = tuple[Callable[[], nn.Module], QATConfig, Any, str]
REFUSED: dict[str, Case] = {
    "twice": (
        lambda: prepare(tiny_vit(), FULL),
        FULL,
        None,
        r"got one that is prepared already \(vit\.embeddings\.patch_embeddings\.projection\)",
    ),
    "quantized": (quantized, FULL, None, r"got quantized model\.layers\.0.*olive\.dequantize"),
    "nan": (with_nan, FULL, None, r"vit\.layers\.1\.mlp\.fc1\.weight: expected finite values, got NaN"),
    "meta": (
        lambda: tiny_vit().to("meta"),
        FULL,
        None,
        r"expected values, got a weight on the meta device; load it first",
    ),
    "nothing": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        FULL,
        None,
        r"expected a layer to quantize besides the first and the last, got none",
    ),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), FULL, None, r"got none \(no parameters\)"),
    "single": (
        lambda: nn.Linear(4, 4),
        FULL,
        None,
        r"expected a model with layers in it, got a single Linear, which cannot .* wrap it in nn\.Sequential",
    ),
    "skip": (tiny_vit, QATConfig(2, skip=("fc7",)), None, r"skip: expected names of modules .*'fc7'"),
    "per_token": (
        tiny_vit,
        QATConfig(2, 2, activation_granularity="per_token"),
        None,
        r"batch: expected one for activation_granularity 'per_token'",
    ),
    "unknown attention": (
        models.gpt2,
        QATConfig(2, 2, qkr=True),
        None,
        r"transformer\.h\.0\.attn: expected an attention that qkr knows .*got GPT2Attention",
    ),
    "unknown attention, quantized": (
        models.gpt2,
        QATConfig(2, 2, quantize_attention=True),
        None,
        r"expected an attention that quantize_attention knows .*got GPT2Attention",
    ),
    "no attention": (convolutions, QATConfig(2, 2, qkr=True), None, r"qkr: expected a model with attention"),
    "rotary": (
        rotary,
        QATConfig(2, 2, qkr=True),
        None,
        r"model\.layers\.0\.self_attn: expected attention without rotary positions for qkr",
    ),
    "projection left out": (
        tiny_vit,
        without_query(),
        None,
        r"expected projections that are all quantized, got q_proj left out",
    ),
    "batch that misses a layer": (
        Unreached,
        FULL,
        torch.randn(2, 4),
        r"batch: expected data that reaches every layer, got none at second\.input_quantizer",
    ),
    "nan in the batch": (tiny_vit, QATConfig(2, 2, qkr=True), half_finite(), "expected finite values in the"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_prepared_is_named_and_left_as_it_was(name: str) -> None:
    make, config, batch, words = REFUSED[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        prepare(model, config, batch=batch)
    assert unchanged(before, model)


def test_a_late_error_leaves_the_bias_of_keys_trainable() -> None:
    model = tiny_vit(attn_implementation="eager")
    last = [one for one in model.modules() if type(one).__name__ == "ViTAttention"][-1]
    last.forward = last.forward  # as some wrapper leaves it
    before = snapshot(model)
    with pytest.raises(ValueError, match="got another on the instance"):
        prepare(model, QATConfig(2, 2, qkr=True))
    assert unchanged(before, model)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        prepare("model")
    with pytest.raises(TypeError, match=r"config: expected an olive\.qat\.QATConfig, got QuantConfig"):
        prepare(tiny_vit(), olive.QuantConfig())
    with pytest.raises(TypeError, match="expected a mapping, tuple, list, tensor"):
        prepare(tiny_vit(), FULL, batch=3)


def test_select_tells_what_share_of_the_model_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4))
    found = select(model, QATConfig())
    assert found.share == (128 + 256 + 64) / sum(one.numel() for one in model.parameters())
    assert [one.name for one in found.skipped] == ["1"]


def test_scales_loaded_in_place_are_not_set_by_the_first_batch() -> None:
    first = prepare(tiny_vit(), QATConfig(2, 4), batch=images())
    second = prepare(tiny_vit(seed=1), QATConfig(2, 4))
    with torch.no_grad():
        for name, tensor in second.state_dict().items():
            tensor.copy_(first.state_dict()[name])
    first.eval(), second.eval()
    other = images(seed=3)
    assert torch.equal(second(**other).logits, first(**other).logits)
