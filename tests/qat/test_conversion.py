"""`convert`: each layer of integers computes what its trained layer did, up to the rounding of sums.

Layers are compared one by one, on the inputs of the trained model: in a whole model a last bit may turn a
value that lies on a threshold to the next level, which all that follow see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import olive
from olive.nn import OVPLinear, UniformConv2d, UniformEmbedding, UniformLinear
from olive.qat import OscillationTracker, QATConfig, anneal, convert, prepare
from olive.qat.attention import QATAttention
from olive.qat.layers import QATConv2d, QATEmbedding, QATLayer
from olive.qat.preparation import prepared_config
from tests import models
from tests.qat.snapshots import snapshot, unchanged
from tests.qat.subjects import images, tiny_llama, tiny_vit, tokens, train

Batch = dict[str, Tensor]
MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "vit": (tiny_vit, images),
    "llama": (tiny_llama, tokens),
    "gpt2": (models.gpt2, tokens),
    "bert": (models.bert, tokens),
}
TOKEN, OFFSETS = {"activation_granularity": "per_token"}, {"activation_offsets": True}
CONFIGS = [
    QATConfig(1),
    QATConfig(3, weights="lsq"),
    QATConfig(4, group_size=10),
    QATConfig(1, 1),
    QATConfig(2, 1, "lsq", **OFFSETS),
    QATConfig(1, 2, "lsq"),
    QATConfig(2, 2, **TOKEN, **OFFSETS),
    QATConfig(3, 4, "lsq", **OFFSETS),
    QATConfig(4, 4, **TOKEN),
    QATConfig(4, 8, **OFFSETS),
    QATConfig(8, 8, "lsq", **TOKEN, **OFFSETS),
    QATConfig(8, 2),
    QATConfig(2, 2, group_size=16),
    QATConfig(4, 4, "lsq", first_last_bits=4),
]


def name_of(config: QATConfig) -> str:
    parts = [f"w{config.weight_bits}", f"a{config.activation_bits or 32}", config.weights]
    parts += ["per_token"] * (config.activation_granularity == "per_token")
    parts += ["offsets"] * config.activation_offsets + [f"groups{config.group_size}"] * (
        config.group_size > 0
    )
    return "-".join(parts)


def trained(
    name: str, config: QATConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Batch]:
    """A prepared model after two steps, in eval mode, and its batch."""
    make, batch = MAKERS[name]
    torch.manual_seed(seed)
    model = make().to(dtype)
    data = {key: one.to(dtype) if one.is_floating_point() else one for key, one in batch().items()}
    prepare(model, config, batch=data)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, 2)
    return model.eval(), data


def seen_by_layers(model: nn.Module, data: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits, and of each layer its input and output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, module in model.named_modules()
        if isinstance(module, QATLayer)
    ]
    with torch.no_grad():
        logits = model(**data).logits
    for handle in handles:
        handle.remove()
    return logits, seen


@torch.no_grad()
def magnitudes(layer: QATLayer, input: Tensor) -> Tensor:
    """Sum of |x| |w|, and |bias|: what the rounding of a sum is in proportion to."""
    weight = layer.quantized_weight().float().abs()
    if isinstance(layer, QATEmbedding):
        return weight.amax()
    values, bias = layer.quantized_input(input).float().abs(), layer._parameters.get("bias")
    bias = None if bias is None else bias.float().abs()
    if isinstance(layer, QATConv2d):
        return functional.conv2d(values, weight, bias, layer.stride, layer.padding)
    found = functional.linear(values, weight, bias)
    if layer.input_quantizer is not None and layer.input_quantizer.offset_after is not None:
        # What was added to each input is added to the bias now.
        found = found + weight @ layer.input_quantizer.offset_after.float().abs()
    return found


def check_layers(model: nn.Module, data: Batch, steps: float) -> tuple[Tensor, Tensor]:
    """Convert, compare each layer in units of its dtype's epsilon, and return logits before and after."""
    before, seen = seen_by_layers(model, data)
    bounds = {name: magnitudes(model.get_submodule(name), input) for name, (input, _) in seen.items()}
    assert convert(model) is model
    assert not any(isinstance(one, QATLayer) for one in model.modules())
    with torch.no_grad():
        for name, (input, output) in seen.items():
            got = model.get_submodule(name)(input)
            assert got.dtype == output.dtype and got.shape == output.shape
            unit = torch.finfo(output.dtype).eps * bounds[name]
            assert bool(((got - output).float().abs() <= steps * unit).all()), name
        return before, model(**data).logits


# Both sum at most 192 products, each in an order of its own. Of such sums float32's error stays within some
# epsilons of the sum of magnitudes (the theorem's bound, 192, is never near); 2.7 at most was seen.
FLOAT32_STEPS = 8


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
@pytest.mark.parametrize("name", list(MAKERS))
def test_layers_compute_what_they_did(name: str, config: QATConfig) -> None:
    model, data = trained(name, config)
    before, after = check_layers(model, data, FLOAT32_STEPS)
    if config.activation_bits is None:  # no levels that a last bit could change
        assert bool(((after - before).abs() <= 1e-5 * before.abs().max()).all())


@pytest.mark.parametrize(
    "config", [QATConfig(4), QATConfig(2, 2), QATConfig(4, 8, "lsq", **TOKEN)], ids=name_of
)
@pytest.mark.parametrize("name", list(MAKERS))
def test_layers_compute_what_they_did_in_bfloat16(name: str, config: QATConfig) -> None:
    """The trained layer rounds levels and the result to bfloat16, half an epsilon each; the new one less."""
    model, data = trained(name, config, torch.bfloat16)
    before, after = check_layers(model, data, 2)
    assert after.dtype == torch.bfloat16
    error = (after.float() - before.float()).square().mean().sqrt() / before.float().square().mean().sqrt()
    assert error <= 0.2
    for module in model.modules():
        if isinstance(module, UniformLinear):
            assert module.scale.dtype == torch.float32
            assert module.input_scale is None or module.input_scale.dtype == torch.float32


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 7, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(7, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 4 * 7, 12),
        nn.Linear(12, 5),
    )


@pytest.mark.parametrize(
    "config",
    [QATConfig(2), QATConfig(2, 2), QATConfig(4, 8, "lsq", **OFFSETS), QATConfig(3, 3, group_size=5)],
    ids=name_of,
)
def test_plain_convolutions_with_padding(config: QATConfig) -> None:
    model, input = convolutions(), torch.randn(4, 3, 8, 8)
    prepare(model, config, batch=input)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input).square().mean().backward()
        optimizer.step()
    model.eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, one in model.named_children():
        one.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        model(input)
        found = dict(seen)
        bounds = {
            name: magnitudes(one, found[name][0])
            for name, one in model.named_children()
            if isinstance(one, QATLayer)
        }
        convert(model)
        assert isinstance(model[3], UniformConv2d) and isinstance(model[7], UniformLinear)
        for name, bound in bounds.items():
            got = model.get_submodule(name)(found[name][0])
            error = (got - found[name][1]).abs()
            assert bool((error <= FLOAT32_STEPS * torch.finfo(torch.float32).eps * bound).all()), name
    model(input[:1])
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("how", "bits", "granularity"),
    [
        ("qkr", None, "per_tensor"),
        ("qkr", 4, "per_tensor"),
        ("qkr", 4, "per_token"),
        ("quantize_attention", 4, "per_tensor"),
        ("quantize_attention", 4, "per_token"),
    ],
)
def test_attention_computes_what_it_did(how: str, bits: int | None, granularity: str) -> None:
    more: dict[str, Any] = {"activation_granularity": granularity, "activation_offsets": bits is not None}
    model, data = trained("vit", QATConfig(2, bits, **{how: True}, **more))
    seen: dict[str, tuple[Any, Any, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QATAttention):
            module.register_forward_hook(
                lambda _, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out[0])}),
                with_kwargs=True,
            )
    with torch.no_grad():
        before = model(**data).logits
        found = dict(seen)
        assert len(found) == 2
        after = convert(model)(**data).logits
        for name, (args, kwargs, output) in found.items():
            attention = model.get_submodule(name)
            got = attention(*args, **kwargs)[0]
            # Sums in another order turn a value on a threshold to the next level now and then.
            same = (got - output).abs() <= 1e-5 * output.abs().max()
            assert float(same.float().mean()) >= (1.0 if bits is None else 0.9)
            trainable = [key for key, one in attention.named_parameters() if one.requires_grad]
            assert all(key.endswith("_proj.bias") for key in trainable)
            assert (how == "qkr") == ("q_proj" not in attention._modules)
    assert (after - before).square().mean() <= 0.05 * before.square().mean()


def test_what_annealing_froze_in_merged_weights_is_kept() -> None:
    """Codes are those of the entries that were held, not of the projections' product."""
    data = images()
    model = prepare(tiny_vit(), QATConfig(2, None, qkr=True), batch=data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    anneal(model, optimizer, 0.01)
    train(model, optimizer, data, 5)
    model.eval()
    merged = next(one for one in model.modules() if isinstance(one, QATAttention)).merged()
    with torch.no_grad():
        before = model(**data).logits
        after = convert(model)(**data).logits
    packed = next(one for one in model.modules() if isinstance(one, QATAttention)).merged_weight.packed
    assert bool(((packed.weight - merged.flatten(0, 1)).abs() <= 1e-6 * merged.abs().max()).all())
    assert bool(((after - before).abs() <= 1e-5 * before.abs().max()).all())


STORAGE = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_memory_is_what_the_bits_come_to(bits: int) -> None:
    model = prepare(nn.Sequential(nn.Linear(9, 30), nn.Linear(30, 7), nn.Linear(7, 3)), QATConfig(bits))
    convert(model)
    body, first = model[1], model[0]
    assert body.codes.numel() == 7 * -(-30 * STORAGE[bits] // 8) and body.codes.dtype == torch.uint8
    assert body.scale.shape == (7, 1) and first.codes.shape == (30, 9)
    stored = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    codes = 30 * 9 + 7 * -(-30 * STORAGE[bits] // 8) + 3 * 7
    assert stored == codes + 4 * (30 + 7 + 3) + 4 * (30 + 7 + 3)  # scales and biases


def test_every_tensor_of_training_is_gone() -> None:
    model, data = trained("llama", QATConfig(2, 4, **OFFSETS))
    OscillationTracker(model)
    convert(model)
    ends = {"codes", "scale", "bias", "input_scale", "input_offset"}
    names = {name.rpartition(".")[2] for name in model.state_dict() if "norm" not in name}
    assert names <= ends
    assert prepared_config(model) is None and not model._forward_pre_hooks
    assert isinstance(model.model.embed_tokens, UniformEmbedding)
    assert isinstance(model.lm_head, UniformLinear)
    with torch.no_grad():
        assert bool(model(**data).logits.isfinite().all())


def test_a_tied_head_and_table_have_the_same_codes() -> None:
    """Tied in training, each has codes of its own after it, which are equal."""
    model, _ = trained("llama", QATConfig(2, first_last_bits=4))
    convert(model)
    table, head = model.model.embed_tokens.packed, model.lm_head
    assert torch.equal(table.codes, head.codes) and torch.equal(table.scale, head.scale)


def test_converted_models_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    model, data = trained("vit", QATConfig(4, 8, qkr=True))
    convert(model)
    pixels = data["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels).logits
    assert torch.equal(got, expected)


def on_levels(model: nn.Module) -> nn.Module:
    """The float model whose weights of few bits lie on their levels."""
    levels = {
        f"{name}.weight": one.channels_first(one.quantized_weight().detach())
        for name, one in model.named_modules()
        if isinstance(one, QATLayer) and "fc" in name
    }
    new = tiny_vit()
    new.load_state_dict({**{key: model.state_dict()[key] for key in new.state_dict()}, **levels})
    return new.eval()


def test_ovp_is_what_quantize_makes_of_the_levels() -> None:
    config = QATConfig(3, None, skip=("attention.*",))
    model, data = trained("vit", config)
    skip = ("attention.*", "vit.embeddings.patch_embeddings.projection", "classifier")
    expected = olive.quantize(on_levels(model), olive.QuantConfig(skip=skip))
    assert convert(model, to="ovp") is model
    layers = [name for name, one in model.named_modules() if isinstance(one, OVPLinear)]
    assert len(layers) == 4 and all("fc" in name for name in layers)
    assert type(model.classifier) is nn.Linear
    with torch.no_grad():
        assert torch.equal(model(**data).logits, expected(**data).logits)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_ovp_of_eight_bits_is_close(name: str) -> None:
    """Offsets of activations go to the bias; only their rounding, of 8 bits, is gone."""
    model, data = trained(name, QATConfig(8, 8, **OFFSETS))
    for module in model.modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(module, QATLayer) and quantizer is not None and quantizer.offset is not None:
            with torch.no_grad():
                for one in (quantizer.offset, quantizer.offset_after):
                    one.uniform_(-10, 10).mul_(quantizer.scale)
    with torch.no_grad():
        before = model(**data).logits
        after = convert(model, to="ovp", config=olive.QuantConfig(bits=8, group_size=32))(**data).logits
    error = (after - before).square().mean() / before.square().mean()
    assert error <= 0.02


def with_nan() -> nn.Module:
    model, _ = trained("vit", QATConfig(2))
    model.vit.layers[0].mlp.fc2.weight.data[0, 0] = float("nan")
    return model


def quantized_attention() -> nn.Module:
    return trained("vit", QATConfig(2, 4, quantize_attention=True))[0]


Case = tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]
REFUSED: dict[str, Case] = {
    "float": (tiny_vit, {}, ValueError, r"expected a prepared model, got another; call olive\.qat\.prepare"),
    "no batch": (
        lambda: prepare(tiny_vit(), QATConfig(2, 4)),
        {},
        ValueError,
        r"scales of activations that a batch has set, got none at vit\..*input_quantizer and others; train",
    ),
    "nan": (with_nan, {}, ValueError, r"vit\.layers\.0\.mlp\.fc2\.weight: expected finite values, got NaN"),
    "target": (
        lambda: prepare(tiny_vit(), QATConfig(2)),
        {"to": "gguf"},
        ValueError,
        "to: expected one of 'uniform', 'ovp', got 'gguf'",
    ),
    "config": (
        lambda: prepare(tiny_vit(), QATConfig(2)),
        {"config": olive.QuantConfig()},
        ValueError,
        "config: expected None with to='uniform'",
    ),
    "ovp after qkr": (
        lambda: trained("vit", QATConfig(2, 4, qkr=True))[0],
        {"to": "ovp"},
        ValueError,
        "to: expected 'uniform' after training with qkr, got 'ovp'",
    ),
    "ovp of unknown names": (
        quantized_attention,
        {"to": "ovp", "config": olive.QuantConfig(skip=("fc7",))},
        ValueError,
        "skip: expected names of modules in the model, got 'fc7'",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_converted_is_named_and_left_as_it_was(name: str) -> None:
    make, values, error, words = REFUSED[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        convert(model, **values)
    assert unchanged(before, model)


def test_a_late_error_leaves_quantizers_in_attention_trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized_attention()
    before = snapshot(model)
    monkeypatch.setattr("olive.qat.conversion.framework_models", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model)
    assert unchanged(before, model)
    monkeypatch.undo()
    convert(copy.deepcopy(model))
    assert unchanged(snapshot(model), model)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        convert({})
    with pytest.raises(TypeError, match="config: expected"):
        convert(prepare(tiny_vit(), QATConfig(2)), to="ovp", config={})
