"""Modules with quantized inputs and 8-bit weights: which product runs, what is stored, what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive import ops
from olive.formats import ActivationFormat, get_codebook, pack_scale
from olive.nn import OVPConv1D, OVPLinear, OVPWeight
from olive.ops.float_activations import linear_float_activations
from tests import models

INT8 = ActivationFormat("int8")
STATIC4 = ActivationFormat("ovp4", 0, "nf4")
STORED_SCALE = pack_scale(torch.tensor([0.05]), torch.tensor([False]))


def layer(
    bits: int = 4, activations: ActivationFormat | None = None, codebook: str = "adaptive", **more: Any
) -> OVPLinear:
    new = OVPLinear(80, 33, group_size=32, bits=bits, activations=activations, **more)
    weight = torch.randn(33, 80)
    if bits == 8:
        new.set_(*ops.ovp8_quantize(weight, 32, "optimal", [1.0, 2.0]))
    else:
        table = get_codebook(codebook).tensor()
        new.set_(*ops.ovp_quantize(weight, table, 32, "optimal", [0.6, 0.9], [0.8], None), table)
    if new.bias is not None:
        nn.init.normal_(new.bias)
    if activations is not None and activations.is_static:
        name = activations.codebook if activations.codebook != "paper" else "flint4"
        new.set_activations_(
            STORED_SCALE, get_codebook(name).tensor() if activations.name == "ovp4" else None
        )
    new.pack_()
    return new


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


FORMATS = [
    None,
    INT8,
    ActivationFormat("int8", 64),
    ActivationFormat("int8", 0),
    ActivationFormat("ovp4", -1, "adaptive"),
    ActivationFormat("ovp4", 32, "flint4"),
    STATIC4,
    ActivationFormat("ovp4", 0, "paper", "paper"),
    ActivationFormat("ovp8", 128),
    ActivationFormat("ovp8", 0, pairing="paper"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_forward_state_dict_copy_and_pickle(bits: int, format: ActivationFormat | None) -> None:
    one = layer(bits, format)
    x = torch.randn(2, 5, 80)
    weight = (one.codes, one.scale, one.codebook, one.bias, 33, 32)
    if format is None:
        expected = ops.ovp_linear(x, *weight) if bits == 4 else ops.ovp8_linear(x, *weight[:2], *weight[3:])
    else:
        static = one.activation_scale if format.is_static else None
        arguments = (format.name, format.group_size, format.pairing, one.activation_codebook, static)
        expected = linear_float_activations(x, *weight, *arguments)
        if one._integer:
            expected = ops.ovp_linear_quantized(x, *weight, *arguments)
    assert torch.equal(one(x), expected)
    keys = {"codes", "scale", "bias", *(["codebook"] if bits == 4 else [])}
    if format is not None and format.is_static:
        keys |= {"activation_scale", *(["activation_codebook"] if format.name == "ovp4" else [])}
    assert set(one.state_dict()) == keys
    assert {name for name, _ in one.named_parameters()} == keys  # parameters: buffers are not sharded
    twin = OVPLinear(80, 33, group_size=32, bits=bits, activations=format)
    twin.load_state_dict(stored(one))
    for other in (twin, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(other(x), one(x))
        assert other.activation_format == one.activation_format
    bare = OVPLinear(80, 33, group_size=32, bits=bits, activations=format, device="meta")
    bare.load_state_dict(stored(one), assign=True)
    assert torch.equal(bare(x), one(x))


@pytest.mark.parametrize(
    ("bits", "codebook", "format", "integer"),
    [
        (4, "adaptive", INT8, True),
        (4, "int4", ActivationFormat("ovp4", 64, "int4"), True),
        (4, "nf4", STATIC4, True),
        (4, "flint4", INT8, False),
        (4, "int4", ActivationFormat("ovp4", -1, "flint4"), False),
        (4, "int4", ActivationFormat("ovp4", 0, "paper"), False),  # flint4 is what was stored
        (4, "int4", ActivationFormat("ovp8"), False),
        (8, "", INT8, False),
    ],
)
def test_products_are_integers_where_every_level_is_an_int8(
    bits: int, codebook: str, format: ActivationFormat, integer: bool
) -> None:
    assert layer(bits, format, codebook)._integer is integer


def test_rows_too_long_for_an_int32_are_multiplied_in_floating_point() -> None:
    small, large = (OVPWeight(1, 140_000, size, activations=INT8) for size in (128, -1))
    table = get_codebook("int4").tensor()
    for weight in (small, large):
        groups = weight.scale.shape[1]
        weight.set_(torch.zeros(1, 70_000, dtype=torch.uint8), torch.full((1, groups), 0x3F80).short(), table)
    assert small._integer and not large._integer
    assert torch.equal(large.linear(torch.randn(2, 140_000)), torch.zeros(2, 1))


def test_the_path_is_decided_anew_when_tensors_are_loaded() -> None:
    one = layer(4, INT8, "int4")
    assert one._integer
    one.load_state_dict(stored(layer(4, INT8, "flint4")))
    assert not one._integer
    one.set_(*layer(4, INT8, "int4").canonical())
    assert one._integer


def test_a_static_scale_of_zero_means_dynamic_per_token() -> None:
    fresh = OVPLinear(80, 33, group_size=32, activations=STATIC4)
    fresh.set_(*layer().canonical())
    assert fresh.activation_format == ActivationFormat("ovp4", -1, "nf4")
    dynamic = layer(4, ActivationFormat("ovp4", -1, "nf4"))
    dynamic.load_state_dict({k: v for k, v in stored(fresh).items() if not k.startswith("activation")})
    x = torch.randn(4, 80)
    assert torch.equal(fresh(x), dynamic(x))
    fresh.set_activations_(STORED_SCALE, get_codebook("nf4").tensor())
    assert fresh.activation_format == STATIC4 and not torch.equal(fresh(x), dynamic(x))
    fresh.set_activations_(torch.zeros(1, dtype=torch.int16), get_codebook("nf4").tensor())
    assert torch.equal(fresh(x), dynamic(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [INT8, STATIC4, ActivationFormat("ovp8", 0)], ids=str)
def test_to_dtype_leaves_stored_tensors_alone(format: ActivationFormat, dtype: torch.dtype) -> None:
    one = layer(4, format)
    before = stored(one)
    out = one(torch.ones(2, 80))
    one.to(dtype)
    for key, value in stored(one).items():
        assert key == "bias" or torch.equal(value, before[key])
    found = one(torch.ones(2, 80, dtype=dtype))
    assert found.dtype == dtype
    assert bool(((found.float() - out).abs() <= 2 * torch.finfo(dtype).eps * out.abs().max()).all())


def test_eight_bits_decode_and_have_no_packed_layout() -> None:
    one = layer(8)
    assert not one.is_packed and one.codebook is None and one.canonical()[2] is None
    linear = one.to_linear()
    assert torch.equal(linear.weight, one.dequantize())  # type: ignore[arg-type]
    x = torch.randn(3, 80)
    assert bool(((one(x) - linear(x)).abs() <= 1e-5 * linear(x).abs().max()).all())
    assert one.weight.shape == (33, 80)


def test_representation_names_bits_and_activations() -> None:
    assert "group_size=32, bits=8, activations=int8, activation_group_size=-1, bias" in repr(layer(8, INT8))
    assert "activations" not in repr(layer()) and "bits" not in repr(layer())


def test_conv1d_takes_bits_and_activations() -> None:
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(7, 80)
    model = nn.Sequential(Conv1D(33, 80))
    with torch.no_grad():
        model[0].weight.normal_()
        exact = model(x)
    olive.quantize(model, olive.QuantConfig(bits=8, activations="ovp8", group_size=32))
    assert isinstance(model[0], OVPConv1D) and model[0].bits == 8
    assert float((model(x).detach() - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("key", "spoil", "message"),
    [
        (
            "activation_scale",
            lambda s: s.float(),
            "activation_scale: expected torch.int16, got torch.float32",
        ),
        ("activation_scale", lambda s: s.repeat(2), r"activation_scale: expected shape \(1,\), got \(2,\)"),
        (
            "activation_scale",
            lambda s: s | 1,
            "activation_scale: expected a positive finite scale without rule",
        ),
        ("activation_scale", lambda s: -s.abs() | -32768, "expected a positive finite scale .* got pattern"),
        ("activation_scale", lambda s: s * 0 + 0x7F80, "positive finite scale .*, or 0, got pattern 7F80"),
        ("activation_codebook", lambda c: c * 0, "weight.activation_codebook"),
        (
            "activation_codebook",
            lambda c: c[:16],
            r"activation_codebook: expected shape \(32,\), got \(16,\)",
        ),
    ],
)
def test_loading_refuses_bad_activation_tensors(key: str, spoil: Any, message: str) -> None:
    one = layer(4, STATIC4)
    before = stored(one)
    with pytest.raises(RuntimeError, match=message):
        one.load_state_dict({**before, key: spoil(before[key])})
    assert all(torch.equal(value, before[name]) for name, value in stored(one).items())


def test_loading_refuses_invalid_pairs_of_eight_bits() -> None:
    one = layer(8)
    state = stored(one)
    state["codes"][3, 4:6] = 0x80
    with pytest.raises(RuntimeError, match=r"codes: expected valid .* got bytes 0x80 0x80 at \[3, 4\]"):
        one.load_state_dict(state)


def test_setting_refuses_what_does_not_fit() -> None:
    codes, scale, table = layer().canonical()
    with pytest.raises(ValueError, match="codebook: expected one for 4 bits, got none"):
        layer().set_(codes, scale)
    with pytest.raises(ValueError, match="codebook: expected none for 8 bits, got one"):
        layer(8).set_(*layer(8).canonical()[:2], table)
    with pytest.raises(ValueError, match="scale: expected a module with static activations, got one without"):
        layer(4, INT8).set_activations_(STORED_SCALE)
    with pytest.raises(ValueError, match="codebook: expected one for activations 'ovp4'"):
        layer(4, STATIC4).set_activations_(STORED_SCALE)
    with pytest.raises(ValueError, match="codebook: expected none for activations 'int8'"):
        layer(4, ActivationFormat("int8", 0)).set_activations_(STORED_SCALE, table)
    with pytest.raises(TypeError, match=r"activation_scale: expected torch.int16, got torch.float32"):
        layer(4, ActivationFormat("int8", 0)).set_activations_(torch.ones(1))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts(name: str, bits: int) -> None:
    model = models.build(name)
    before = models.logits(model)
    config = olive.QuantConfig(bits=bits, group_size=32, activations="int8", activation_group_size=0)
    olive.quantize(model, config, calibration=[models.inputs(model)])
    experts = next(module for module in model.modules() if isinstance(module, olive.nn.OVPExperts))
    for weight in experts.weights().values():
        assert weight.bits == bits and weight.activation_format == config.activation_format
        assert weight.activation_scale is not None and tuple(weight.activation_scale.shape) == (1,)
        assert weight.activation_figures is not None and weight.activation_figures.sqnr_db > 25  # type: ignore[operator]
    after = models.logits(model)
    assert float((after - before).norm() / before.norm()) < (0.35 if bits == 4 else 0.12)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(models.logits(twin), after)
    olive.dequantize(model)
    assert type(experts) not in {type(module) for module in model.modules()}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it imports inductor
@pytest.mark.parametrize("format", [INT8, ActivationFormat("ovp4", 32, "flint4"), STATIC4], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_layer_gives_the_same_result(bits: int, format: ActivationFormat) -> None:
    one = layer(bits, format)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 80, requires_grad=True)
    assert torch.equal(compiled(x), one(x))
    compiled(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_made_under_another_default_device() -> None:
    source = layer(4, ActivationFormat("ovp4", -1, "nf4"))
    with torch.device("meta"):
        bare = OVPLinear(80, 33, group_size=32, activations=source.activations)
        assert bare.codes.is_meta and bare.activation_codebook.is_meta  # type: ignore[union-attr]
        bare.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(bare.activation_codebook, get_codebook("nf4").tensor())  # type: ignore[arg-type]
    x = torch.randn(2, 80)
    assert torch.equal(bare(x), source(x))
