"""OVPLinear and OVPConv1D: they compute with the decoded weight, and survive everything done to a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.nn import OVPConv1D, OVPLinear
from tests import models

GROUPS = (32, 64, 128, -1, 0)


def quantized_linear(
    columns: int = 80,
    rows: int = 33,
    *,
    group_size: int = 32,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> OVPLinear:
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=dtype))
    layer = olive.quantize(model, olive.QuantConfig(group_size=group_size))[0]  # type: ignore[index]
    assert isinstance(layer, OVPLinear)
    return layer


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Elementwise, in units of the largest value expected."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    difference = (got.double() - expected.double()).abs()
    assert bool((difference <= tolerance * expected.double().abs().max()).all()), float(difference.max())


def stored(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (33, 7), (80, 33), (192, 40)])
def test_forward_is_the_decoded_weight_times_input(group_size: int, columns: int, rows: int) -> None:
    layer = quantized_linear(columns, rows, group_size=group_size)
    input = torch.randn(3, 5, columns)
    expected = nn.functional.linear(input, layer.dequantize(), layer.bias)
    # Two float32 sums of at most 192 products in different orders.
    assert_close(layer(input), expected.detach(), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = quantized_linear(192, 40, dtype=dtype)
    input = torch.randn(4, 192, dtype=dtype)
    expected = nn.functional.linear(input.double(), layer.dequantize().double(), layer.bias.double())  # type: ignore[union-attr]
    # Rounding once to the output's dtype is half an ulp; the rest is room for the kernels' input rounding.
    assert_close(layer(input), expected.detach().to(dtype), 2 * torch.finfo(dtype).eps)


def test_zero_rows_give_zero_rows() -> None:
    layer = quantized_linear()
    assert layer(torch.empty(0, 80)).shape == (0, 33)
    assert layer(torch.empty(2, 0, 80)).shape == (2, 0, 33)


def test_a_vector_gives_a_vector() -> None:
    assert quantized_linear()(torch.randn(80)).shape == (33,)


def test_input_need_not_be_contiguous() -> None:
    layer = quantized_linear()
    input = torch.randn(80, 6).t()
    assert not input.is_contiguous()
    assert torch.equal(layer(input), layer(input.contiguous()))
    strided = torch.randn(6, 160)[:, ::2]
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_wrong_input_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected shape"):
        quantized_linear()(torch.randn(2, 200))


def test_integer_input_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"input: expected float32, bfloat16 or float16, got torch.int64"):
        quantized_linear()(torch.ones(2, 80, dtype=torch.int64))


def test_state_dict_is_canonical_and_round_trips_while_packed() -> None:
    layer = quantized_linear()
    assert layer.is_packed
    state = stored(layer)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "codes": (torch.uint8, (33, 40)),
        "scale": (torch.int16, (33, 3)),
        "codebook": (torch.int8, (32,)),
        "bias": (torch.float32, (33,)),
    }
    layer.unpack_()
    assert_same_tensors(stored(layer), state)
    layer.pack_()
    assert_same_tensors(stored(layer), state)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_packed_module(assign: bool) -> None:
    source, target = quantized_linear(), quantized_linear()
    input = torch.randn(4, 80)
    assert not torch.equal(source(input), target(input))
    target.load_state_dict(stored(source), assign=assign)
    assert target.is_packed
    assert_same_tensors(stored(target), stored(source))
    assert torch.equal(source(input), target(input))


def test_loading_into_a_module_without_values() -> None:
    source = quantized_linear()
    target = OVPLinear(80, 33, group_size=32, device="meta")
    target.load_state_dict(stored(source), assign=True)
    input = torch.randn(4, 80)
    assert target.is_packed and torch.equal(source(input), target(input))


@pytest.mark.parametrize(
    ("key", "spoil", "message"),
    [
        ("codes", lambda codes: codes[:, :-1], r"weight.codes: expected shape \(33, 40\), got \(33, 39\)"),
        ("codes", lambda codes: codes.float(), "weight.codes: expected torch.uint8, got torch.float32"),
        ("scale", lambda scale: scale.to(torch.int32), "weight.scale: expected torch.int16, got torch.int32"),
        ("scale", lambda scale: scale * 0, "weight.scale: expected finite non-zero scales"),
        ("codebook", lambda codebook: codebook * 0, "weight.codebook"),
    ],
)
def test_loading_refuses_tensors_of_another_kind(key: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    layer = quantized_linear()
    before = stored(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**before, key: spoil(before[key])})
    assert_same_tensors(stored(layer), before)
    assert layer.is_packed


def test_loading_refuses_invalid_pairs() -> None:
    model = nn.Sequential(nn.Linear(80, 33))
    olive.quantize(model, olive.QuantConfig(codebook="int4", group_size=32))
    state = stored(model)
    state["0.codes"][5, 7] = 0x88
    with pytest.raises(
        RuntimeError, match=r"0.codes: expected valid outlier-victim pairs, got byte 0x88 at \[5, 7\]"
    ):
        model.load_state_dict(state)


def test_deepcopy_and_pickle_give_the_same_layer() -> None:
    layer = quantized_linear()
    input = torch.randn(4, 80)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin is not layer and twin.sqnr_db == layer.sqnr_db and twin.dtype == layer.dtype
        assert_same_tensors(stored(twin), stored(layer))
        assert torch.equal(twin(input), layer(input))
        assert twin.codes.data_ptr() != layer.codes.data_ptr()


def test_whole_module_survives_torch_save() -> None:
    layer = quantized_linear()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(torch.ones(2, 80)), layer(torch.ones(2, 80)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_moves_the_bias_and_leaves_codes_and_rule_bits(dtype: torch.dtype) -> None:
    layer = quantized_linear(192, 64)
    before = stored(layer)
    assert bool((before["scale"] & 1).any()) and not bool((before["scale"] & 1).all())
    layer.to(dtype)
    after = stored(layer)
    assert after.pop("bias").dtype == dtype and layer.weight.dtype == dtype
    before.pop("bias")
    assert_same_tensors(after, before)
    assert layer.is_packed


def test_the_dtype_of_a_layer_without_bias_follows_too() -> None:
    layer = quantized_linear(bias=False)
    assert layer.bfloat16().weight.dtype == torch.bfloat16


def test_weight_decodes_only_when_its_values_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized_linear()
    calls = []
    monkeypatch.setattr(
        layer, "to_float", lambda: calls.append(1) or OVPLinear.to_float(layer), raising=False
    )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert weight.dtype == torch.float32 and weight.shape == (33, 80) and weight.device.type == "cpu"
    assert weight.ndim == 2 and weight.size(1) == 80 and weight.numel() == 2640 and not weight.requires_grad
    assert calls == []
    assert torch.equal(weight + 0, layer.dequantize()) and type(weight + 0) is Tensor
    assert torch.equal(weight.detach().t(), layer.dequantize().t())
    assert weight.tolist() == layer.dequantize().tolist()
    assert calls


def test_from_linear_shares_the_bias_and_takes_over_hooks() -> None:
    linear = nn.Linear(80, 33).eval()
    seen: list[int] = []
    handle = linear.register_forward_hook(lambda module, args, out: seen.append(1))
    layer = OVPLinear.from_linear(linear, 32)
    assert layer.bias is linear.bias and not layer.training
    source = quantized_linear()
    layer.set_(*source.canonical())
    layer(torch.ones(1, 80))
    assert seen == [1]
    handle.remove()
    layer(torch.ones(1, 80))
    assert seen == [1]


def test_to_linear_is_the_inverse() -> None:
    layer = quantized_linear()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.bias is layer.bias
    assert torch.equal(linear.weight, layer.dequantize()) and linear.weight.requires_grad
    bare = OVPLinear(80, 33, group_size=32)
    bare.set_(*layer.canonical())
    assert type(bare.to_linear()) is nn.Linear


def test_set_checks_shape_and_dtype() -> None:
    layer = quantized_linear()
    codes, scale, codebook = layer.canonical()
    with pytest.raises(ValueError, match=r"codes: expected shape \(33, 40\), got \(33, 39\)"):
        layer.set_(codes[:, 1:], scale, codebook)
    with pytest.raises(TypeError, match=r"scale: expected torch.int16, got torch.float32"):
        layer.set_(codes, scale.float(), codebook)


def test_conv1d_keeps_its_sizes_and_layout() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(33, 80))
    float_weight = model[0].weight.detach().clone()
    layer = olive.quantize(model, olive.QuantConfig(group_size=32))[0]  # type: ignore[index]
    assert isinstance(layer, OVPConv1D) and (layer.nf, layer.nx) == (33, 80)
    assert layer.weight.shape == (80, 33)
    assert torch.equal(layer.weight.clone(), layer.dequantize().t())
    input = torch.randn(2, 3, 80)
    assert_close(layer(input), (input @ layer.weight.clone() + layer.bias).detach(), 2e-5)  # type: ignore[operator]
    assert float((layer.weight.clone() - float_weight).norm() / float_weight.norm()) < 0.12
    restored = olive.dequantize(model)[0]  # type: ignore[index]
    assert (
        type(restored) is Conv1D
        and restored.weight.shape == (80, 33)
        and repr(restored) == "Conv1D(nf=33, nx=80)"
    )


def test_extra_repr_names_the_sizes() -> None:
    assert "in_features=80, out_features=33, group_size=32, bias=True" in repr(quantized_linear())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it imports inductor
def test_compiled_model_gives_the_same_result(backend: str) -> None:
    model = olive.quantize(nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 33, bias=False)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    input = torch.randn(5, 96)
    assert torch.equal(compiled(input), model(input))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_model_trains_what_is_before_it() -> None:
    model = olive.quantize(models.plain())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        input = torch.ones(2, 96, requires_grad=True)
        forward(input).square().sum().backward()
        gradients.append(input.grad)
    assert_close(gradients[1], gradients[0], 1e-6)  # type: ignore[arg-type]
