"""`QATAttention`: exact without rounding, biases included; quantized as configured; what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olive.qat import QATConfig
from olive.qat.attention import QATAttention
from olive.qat.attention_classes import (
    ATTENTIONS,
    attention_of,
    find_attentions,
    is_rotary,
    unknown_attentions,
)
from olive.walk import exchange
from tests.models import build as build_model
from tests.models import inputs
from tests.qat.attentions import (
    CHANNELS,
    HEADS,
    MAKERS,
    WITHOUT_ROTARY,
    arguments,
    build,
    exact,
    hidden,
    positions,
    prepare,
)

MERGED = QATConfig(qkr=True)
SEPARATE = QATConfig(activation_bits=4, quantize_attention=True)
QUANTIZED = QATConfig(qkr=True, activation_bits=4)
PER_TOKEN = {"activation_granularity": "per_token"}


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)


def without_quantizers(name: str) -> QATAttention:
    """Separate queries and keys, nothing rounded."""
    attention = exact(prepare(build(name), SEPARATE))
    for module in list(attention.modules()):
        for key in [one for one in module._modules if one.endswith("_quantizer") and "weight" not in one]:
            module._modules[key] = None
    return attention


def equal(got: Tensor, expected: Tensor) -> bool:
    """Up to float32's rounding in another order: sums of up to 24 terms of size up to ten."""
    return bool(((got - expected).abs() <= 1e-5 * (1 + expected.abs().max())).all())


def mostly_equal(got: Tensor, expected: Tensor) -> bool:
    """Sums in another order round to the next level now and then, which moves what depends on them."""
    return float(((got - expected).abs() <= 1e-5 * (1 + expected.abs().max())).float().mean()) > 0.8


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "batch"])
@pytest.mark.parametrize("name", WITHOUT_ROTARY)
def test_merged_attention_without_rounding_is_the_float_one_biases_included(name: str, mask: str) -> None:
    module = build(name)
    assert module.get_submodule(attention_of(module).query).bias is not None
    x, keep = hidden(), causal(5)
    chosen: Tensor | None = {"none": None, "bool": keep, "additive": additive(keep)}.get(mask)
    if mask == "batch":  # padding of one sample
        chosen = additive(torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()[:, None, None])
    if chosen is not None and chosen.dtype is torch.bool:
        module.config._attn_implementation = "sdpa"
    more = arguments(name)
    expected, probabilities = module(x, attention_mask=chosen, **more)
    got, found = exact(prepare(module, MERGED))(x, attention_mask=chosen, **more)
    assert equal(got, expected)
    assert found.shape == (2, HEADS, 5, 5)
    if probabilities is not None:
        assert equal(found, probabilities)


@pytest.mark.parametrize("name", list(MAKERS))
def test_separate_attention_without_rounding_is_the_float_one(name: str) -> None:
    torch.manual_seed(1)
    expected_module, got_module = build(name), without_quantizers(name)
    got_module.load_state_dict(expected_module.state_dict())
    x, more = hidden(), arguments(name)
    expected, _ = expected_module(x, attention_mask=None, **more)
    got, _ = got_module(x, attention_mask=None, **more)
    assert equal(got, expected)


def test_causal_attention_sees_no_later_key_without_a_mask() -> None:
    attention = prepare(build("smollm3"), MERGED)
    _, probabilities = attention(hidden())
    assert not probabilities.triu(1).any()
    _, free = attention(hidden(), is_causal=False)
    assert bool((free > 0).all())
    _, one = attention(hidden(length=1))
    assert bool((one == 1).all())


def test_a_query_without_keys_attends_to_none() -> None:
    attention = prepare(build("vit"), MERGED)
    x = hidden().requires_grad_()
    keep = causal(5).clone()
    keep[..., 2, :] = False
    _, probabilities = attention(x, attention_mask=keep)
    assert not probabilities[:, :, 2].any()
    probabilities.square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_arguments_keep_their_order() -> None:
    x, keep = hidden(), additive(causal(5))
    vit = prepare(build("vit"), MERGED)
    assert torch.equal(vit(x, keep)[0], vit(hidden_states=x, attention_mask=keep)[0])
    llama = prepare(build("llama"), SEPARATE)
    turns = positions(5)
    named = llama(x, position_embeddings=turns, attention_mask=keep)[0]
    assert torch.equal(llama(x, turns, keep)[0], named)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("qkr", [False, True])
def test_scales_and_offsets_have_their_shapes(qkr: bool, offsets: bool, granularity: str) -> None:
    config = QATConfig(
        activation_bits=4,
        qkr=qkr,
        quantize_attention=True,
        activation_granularity=granularity,
        activation_offsets=offsets,
    )
    name = "smollm3"
    attention = prepare(build(name), config)
    output, _ = attention(hidden(), **arguments(name))
    assert output.shape == (2, 5, CHANNELS)
    places = 5 if granularity == "per_token" else 1
    shapes = {key: tuple(value.shape) for key, value in attention.named_parameters() if value.dim() == 1}
    values = CHANNELS // 2  # two of four heads
    assert shapes["value_quantizer.scale"] == (values,)
    assert shapes["probability_quantizer.scale"] == (places,)
    assert "probability_quantizer.offset" not in shapes
    assert not attention.probability_quantizer.is_signed
    assert attention.key_quantizer.is_signed
    assert attention.value_quantizer.is_signed
    if qkr:
        assert shapes["key_quantizer.scale"] == (places * HEADS,)
        assert shapes["input_quantizer.scale"] == (places,)
        assert attention.v_proj.input_quantizer is None
        assert attention.query_quantizer is None
    else:
        assert shapes["key_quantizer.scale"] == shapes["query_quantizer.scale"] == (places,)
        assert attention.query_quantizer.is_signed
    expected = {"value_quantizer.offset": values, "value_quantizer.offset_after": values}
    expected |= (
        {"key_offset": HEADS * CHANNELS, "input_quantizer.offset": CHANNELS}
        if qkr
        else {
            "query_quantizer.offset": CHANNELS,
            "query_quantizer.offset_after": CHANNELS,
            "key_quantizer.offset": values,
        }
    )
    for key, size in expected.items():
        assert shapes.get(key) == ((size,) if offsets else None), key
    assert "key_quantizer.offset_after" not in shapes
    output.square().sum().backward()
    for key, value in attention.named_parameters():
        if key != "k_proj.bias" or not qkr:
            assert value.grad is not None, key


def test_only_layers_inputs_are_quantized_where_the_config_says_so() -> None:
    config = QATConfig(qkr=True, activation_bits=4, quantize_attention=False)
    attention = prepare(build("vit"), config)
    attention(hidden())
    assert attention.input_quantizer.is_initialized
    quantizers = (f"{which}_quantizer" for which in ("query", "key", "value", "probability"))
    assert all(getattr(attention, name) is None for name in quantizers)


@pytest.mark.parametrize("name", ["vit", "smollm3"])
@pytest.mark.parametrize("more", [{}, PER_TOKEN])
def test_merged_logits_come_of_levels(name: str, more: dict[str, Any]) -> None:
    attention = prepare(build(name), QATConfig(qkr=True, activation_bits=3, **more))
    x = hidden()
    _, probabilities = attention(x, is_causal=False, **arguments(name))
    input = attention.input_quantizer(x)
    matrices, bias = attention.merged(), attention.key_bias()
    logits = []
    for head in range(HEADS):
        keys = input @ matrices[head].T
        scale = attention.key_quantizer.scale.detach().view(-1, HEADS)[:, head]  # of positions, or of all
        keys = scale[:, None] * (keys / scale[:, None]).clamp(-4, 3).round()
        logits.append(attention.scaling * (input @ keys.transpose(1, 2) + (input @ bias[head])[:, None]))
    expected = attention.probability_quantizer(torch.stack(logits, 1).softmax(-1))
    # A sum in another order may round to the next level now and then.
    assert float(((probabilities - expected).abs() <= 1e-5).float().mean()) > 0.98


def test_probabilities_below_half_a_uniform_step_are_not_all_lost() -> None:
    attention = prepare(build("vit"), QATConfig(qkr=True, activation_bits=2))
    with torch.no_grad():
        _, probabilities = attention(0.1 * hidden(length=50))  # about 1/50 each, of levels up to 3 s
    assert bool((probabilities.sum(-1) > 0.5).all())


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED, MERGED])
def test_state_dict_keeps_the_float_keys_and_round_trips(config: QATConfig) -> None:
    module = build("bert")
    keys = set(module.state_dict())
    attention = prepare(module, config)
    x = hidden()
    expected = attention(x)[0]
    state = attention.state_dict()
    assert keys <= set(state)
    assert not any("projections" in key for key in state)
    other = prepare(build("bert"), config)
    other.load_state_dict(state)
    assert torch.equal(other(x)[0], expected)


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_deepcopy_and_pickle_are_independent(config: QATConfig) -> None:
    attention = prepare(build("smollm3"), config)
    x, more = hidden(), arguments("smollm3")
    expected = attention(x, **more)[0]
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    for other in (copy.deepcopy(attention), torch.load(file, weights_only=False)):
        assert type(other) is type(attention)
        assert torch.equal(other(x, **more)[0], expected)
        with torch.no_grad():
            other.q_proj.weight.mul_(-1)  # its merged weight looks at its own projections
        assert not torch.equal(other(x, **more)[0], expected)
        assert torch.equal(attention(x, **more)[0], expected)


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
@pytest.mark.parametrize("name", WITHOUT_ROTARY)
def test_to_float_gives_the_module_back(name: str, config: QATConfig) -> None:
    module = build(name)
    x, more = hidden(), arguments(name)
    expected = module(x, attention_mask=None, **more)[0]
    trained = {key: value.requires_grad for key, value in module.named_parameters()}
    back = prepare(module, config).to_float()
    assert type(back) is type(module)
    assert list(back._modules) == list(module._modules)
    assert torch.equal(back(x, attention_mask=None, **more)[0], expected)
    assert {key: value.requires_grad for key, value in back.named_parameters()} == trained
    for key, value in module.named_parameters():
        assert dict(back.named_parameters())[key] is value


def test_biases_of_keys_take_no_gradient_when_merged() -> None:
    module = build("vit")
    attention = prepare(module, MERGED)
    attention(hidden())[0].sum().backward()
    assert not attention.k_proj.bias.requires_grad
    assert attention.q_proj.bias.grad is not None
    module = build("vit")
    module.k_proj.bias.requires_grad_(False)
    assert not prepare(module, MERGED).to_float().k_proj.bias.requires_grad


def test_dropout_of_probabilities_follows_the_mode() -> None:
    module = build("bert")
    module.dropout.p = 0.5
    attention = prepare(module, MERGED)
    x = hidden()
    assert torch.equal(attention(x)[0], attention(x)[0])
    attention.train()
    _, probabilities = attention(x)
    dropped = float((probabilities == 0).float().mean())
    assert 0.3 < dropped < 0.7


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_bfloat16_autocast_trains(config: QATConfig) -> None:
    attention = prepare(build("vit"), config).train()
    x = hidden()
    attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(x)
    assert output.dtype is torch.bfloat16
    output.float().square().mean().backward()
    assert attention.q_proj.weight.grad.dtype is torch.float32
    assert bool((attention.q_proj.weight.grad != 0).any())


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_bfloat16_parameters_stay_bfloat16(config: QATConfig) -> None:
    attention = prepare(build("smollm3").bfloat16(), config)
    turns = tuple(one.bfloat16() for one in positions(5))
    output, probabilities = attention(hidden().bfloat16(), position_embeddings=turns)
    assert output.dtype is probabilities.dtype is torch.bfloat16


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_empty_batch_and_strided_input(config: QATConfig) -> None:
    attention = prepare(build("vit"), config)
    x = hidden()
    expected = attention(x)[0]
    assert attention(hidden(batch=0))[0].shape == (0, 5, CHANNELS)
    strided = torch.stack((x, -x), -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert mostly_equal(attention(strided)[0], expected)


def test_a_cache_holds_quantized_keys_and_serves_token_by_token() -> None:
    from transformers import DynamicCache

    attention = prepare(build("llama"), SEPARATE)
    x, (cos, sin) = hidden(), positions(5)
    whole, _ = attention(x, position_embeddings=(cos, sin))
    cache = DynamicCache()
    steps = [
        attention(
            x[:, one : one + 1],
            position_embeddings=(cos[:, one : one + 1], sin[:, one : one + 1]),
            past_key_values=cache,
        )[0]
        for one in range(5)
    ]
    assert mostly_equal(torch.cat(steps, 1), whole)
    scale = float(attention.key_quantizer.scale.detach())
    codes = cache.layers[0].keys / scale
    assert bool(((codes - codes.round()).abs() <= 1e-4).all())


def test_of_an_encoder_decoder_s_caches_the_one_of_self_attention_is_used() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    module = build("bert")
    module.layer_idx = 0
    attention = prepare(module, SEPARATE)
    caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
    attention(hidden(), past_key_values=caches)
    _, probabilities = attention(hidden(length=1), past_key_values=caches)
    assert probabilities.shape[-1] == caches.self_attention_cache.get_seq_length() == 6
    assert caches.cross_attention_cache.get_seq_length() == 0


def _replaced(model: nn.Module, config: QATConfig) -> nn.Module:
    found = find_attentions(model)
    assert found
    exchange(model, {module: prepare(module, config, name) for name, module in found.items()})
    return model


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_a_model_records_the_probabilities(name: str, config: QATConfig) -> None:
    model = build_model(name).eval()
    model = _replaced(model, config)
    assert find_attentions(model) == unknown_attentions(model) == {}
    with torch.no_grad():
        output = model(**inputs(model), output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    assert output.attentions[0].shape[1] == 4
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs(model), output_attentions=True).attentions[0], output.attentions[0])


def test_a_decoder_trains_and_generates() -> None:
    model = _replaced(build_model("llama"), SEPARATE).train()
    batch = inputs(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.eval()
    kept = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    plain = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(kept, plain)


@pytest.mark.parametrize("config", [SEPARATE, QUANTIZED])
def test_a_model_compiles_in_one_graph(config: QATConfig) -> None:
    model = _replaced(build_model("vit"), config)
    batch = inputs(model)
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**batch).logits
    assert equal(got, expected)
    got.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.dim() == 2)


def test_find_attentions_names_known_ones_and_unknown_attentions_others() -> None:
    bert = build_model("bert")
    assert list(find_attentions(bert)) == ["bert.encoder.layer.0.attention.self"]
    assert unknown_attentions(bert) == {}
    gpt2 = build_model("gpt2")
    assert find_attentions(gpt2) == {}
    assert list(unknown_attentions(gpt2)) == ["transformer.h.0.attn"]
    plain = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert list(unknown_attentions(plain)) == ["0"]


def test_known_classes_exist() -> None:
    import importlib

    for full in ATTENTIONS:
        module, _, cls = full.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), cls), nn.Module)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "smollm3_rotary"])
def test_rotary_positions_are_refused_when_merging(name: str) -> None:
    module = build(name)
    assert is_rotary(module)
    assert not is_rotary(build("smollm3"))
    cls = type(module).__name__
    with pytest.raises(ValueError, match=rf"layer\.attention: .* got {cls} .* distance .*use qkr=False"):
        prepare(module, MERGED)
    prepare(module, SEPARATE)


def test_what_is_not_known_is_refused() -> None:
    from transformers.models.bert.modeling_bert import BertConfig, BertCrossAttention

    cross = BertCrossAttention(BertConfig(hidden_size=CHANNELS, num_attention_heads=HEADS))
    assert list(unknown_attentions(cross)) == [""]
    with pytest.raises(ValueError, match=r"layer\.attention: .* got cross attention \(BertCrossAttention\)"):
        prepare(cross, MERGED)
    with pytest.raises(ValueError, match=r"layer\.attention: expected one of ViTAttention, .* got Linear"):
        prepare(nn.Linear(2, 2), MERGED)
    with pytest.raises(ValueError, match=r"module: expected one of .* got Linear"):
        is_rotary(nn.Linear(2, 2))


def test_a_config_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a config with quantize_attention or qkr, got neither"):
        prepare(build("vit"), QATConfig())


def test_changed_modules_are_refused() -> None:
    module = build("vit")
    module.forward = module.forward  # as hooks of other libraries do
    with pytest.raises(ValueError, match="expected the forward of ViTAttention, got another"):
        prepare(module, MERGED)
    module = build("vit")
    module.q_proj = nn.Sequential(module.q_proj)
    with pytest.raises(TypeError, match=r"layer\.attention\.q_proj: expected nn\.Linear, got Sequential"):
        prepare(module, MERGED)


def test_other_implementations_are_refused_early_and_late() -> None:
    module = build("vit")
    attention = prepare(module, MERGED)
    module.config._attn_implementation = "flash_attention_2"
    match = r"layer\.attention: expected attention implementation .* got 'flash_attention_2'"
    with pytest.raises(ValueError, match=match):
        prepare(module, MERGED)
    with pytest.raises(ValueError, match=match):
        attention(hidden())


def test_caches_are_refused_where_they_cannot_work() -> None:
    from transformers import DynamicCache

    more = arguments("smollm3")
    with pytest.raises(ValueError, match=r"no cache with qkr.*use_cache=False"):
        prepare(build("smollm3"), MERGED)(hidden(), past_key_values=DynamicCache(), **more)
    config = QATConfig(activation_bits=4, quantize_attention=True, activation_granularity="per_token")
    with pytest.raises(
        ValueError, match=r"no cache with activation_granularity 'per_token'.*use_cache=False"
    ):
        prepare(build("smollm3"), config)(hidden(), past_key_values=DynamicCache(), **more)


def test_other_lengths_are_refused_per_token() -> None:
    for qkr in (False, True):
        config = QATConfig(activation_bits=4, quantize_attention=True, qkr=qkr, **PER_TOKEN)
        attention = prepare(build("vit"), config)
        attention(hidden())
        with pytest.raises(ValueError, match="activation_granularity='per_tensor'"):
            attention(hidden(length=6))


def test_integer_masks_and_missing_positions_are_refused() -> None:
    with pytest.raises(TypeError, match=r"attention_mask: expected bool or float, got torch\.int64"):
        prepare(build("vit"), MERGED)(hidden(), attention_mask=causal(5).long())
    with pytest.raises(ValueError, match=r"layer\.attention: expected position_embeddings, got None"):
        prepare(build("llama"), SEPARATE)(hidden())


def test_separate_queries_have_no_merged_matrix() -> None:
    attention = prepare(build("vit"), SEPARATE)
    for method in (attention.merged, attention.key_bias):
        with pytest.raises(ValueError, match="expected queries and keys merged by qkr=True"):
            method()
