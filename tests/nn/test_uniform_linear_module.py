"""UniformLinear: from codes, moves and dtypes, state dicts, copies, the compiler, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olive import ops
from olive.nn import UniformLinear
from olive.ops.lsq import integer_range


def layer(bits: int = 4, group_size: int = 16, quantized: bool = True, **more: Any) -> UniformLinear:
    weight = torch.randn(9, 40)
    codes, scale = ops.statsq_codes(weight, bits, group_size)
    inputs: dict[str, Any] = {}
    if quantized:
        inputs = {
            "input_scale": 0.05 + 0.1 * torch.rand(6),
            "input_offset": 0.1 * torch.randn(40),
            "input_bits": 4,
        }
    return UniformLinear.from_codes(
        codes,
        scale / 2 ** (bits - 1),
        nn.Parameter(torch.randn(9)),
        bits=bits,
        mid_rise=True,
        group_size=group_size,
        **{**inputs, **more},
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_weight_is_what_statsq_trained_with(bits: int) -> None:
    weight = torch.randn(9, 40)
    for group_size in (-1, 16):
        codes, scale = ops.statsq_codes(weight, bits, group_size)
        how = {"bits": bits, "mid_rise": True, "group_size": group_size}
        new = UniformLinear.from_codes(codes, scale / 2 ** (bits - 1), **how)
        assert torch.equal(new.dequantize(), ops.statsq(weight, bits, group_size))


def test_the_weight_is_what_lsq_trained_with() -> None:
    weight, scale = torch.randn(9, 40), 0.1 + torch.rand(9)
    expected = ops.lsq(weight, scale, 3, True, 0)
    codes = (expected / scale[:, None]).round().to(torch.int8)
    new = UniformLinear.from_codes(codes, scale[:, None], bits=3, mid_rise=False)
    assert torch.equal(new.dequantize(), expected)


def test_forward_is_a_linear_of_quantized_inputs() -> None:
    new = layer()
    x = torch.randn(2, 6, 40)
    q = ops.lsq(x + new.input_offset, new.input_scale, 4, True, 1)
    expected = torch.nn.functional.linear(q, new.dequantize(), new.bias)
    assert torch.allclose(new(x), expected, atol=1e-5)
    plain = layer(quantized=False)
    assert torch.allclose(plain(x), plain.to_linear()(x), atol=1e-3)
    assert new.input_range == integer_range(4, True) and plain.input_range is None


def test_scales_keep_their_bits_in_other_dtypes() -> None:
    new = layer()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert new.to(dtype) is new
        assert new.dtype == dtype and new.weight.dtype == dtype and new.to_float().dtype == dtype
        assert new.bias is not None and new.bias.dtype == dtype
        for name in ("codes", "scale", "input_scale", "input_offset"):
            found = new.state_dict()[name]
            assert found.dtype == before[name].dtype and torch.equal(found, before[name])
    assert new.bfloat16()(torch.randn(6, 40).bfloat16()).dtype == torch.bfloat16


def test_a_module_without_memory_can_be_filled() -> None:
    source = layer()
    how: dict[str, Any] = {"group_size": 16, "input_bits": 4, "input_tokens": 6, "input_offset": True}
    empty = UniformLinear(40, 9, **how, device="meta")
    empty = empty.to_empty(device="cpu")
    assert empty.scale.dtype == torch.float32
    empty.load_state_dict(source.state_dict())
    x = torch.randn(6, 40)
    assert torch.equal(empty(x), source(x))
    assigned = UniformLinear(40, 9, **how, device="meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned(x), source(x))


def test_state_dict_keys() -> None:
    assert list(layer().state_dict()) == ["bias", "codes", "scale", "input_scale", "input_offset"]
    assert list(layer(quantized=False).state_dict()) == ["bias", "codes", "scale"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_apart(copied: Any) -> None:
    new, x = layer(), torch.randn(6, 40)
    other = copied(new)
    assert torch.equal(other(x), new(x))
    other.codes.zero_()
    assert not torch.equal(other(x), new(x))


def test_weight_decodes_when_its_values_are_used() -> None:
    new = layer()
    assert new.weight.shape == (9, 40) and new.weight.device == new.codes.device
    assert torch.equal(new.weight + 0, new.to_float())
    linear = new.eval().to_linear()
    assert torch.equal(linear.weight, new.to_float())
    assert linear.bias is new.bias and not linear.training and not linear.weight.requires_grad


@pytest.mark.parametrize("quantized", [False, True])
def test_compiles_whole(quantized: bool) -> None:
    new, x = layer(quantized=quantized), torch.randn(2, 6, 40)
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), new(x))


def test_inputs_and_bias_get_gradients() -> None:
    new, x = layer(), torch.randn(6, 40, requires_grad=True)
    new(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, new.dequantize().sum(0).expand(6, -1), atol=1e-5)
    assert new.bias is not None and new.bias.grad is not None
    assert [name for name, _ in new.named_parameters()] == ["bias"]


def test_says_what_it_is() -> None:
    assert (
        "bits=4 (mid-rise), group_size=16, bias=True, input_bits=4 (signed), input_tokens=6, input_offset"
        in (repr(layer()))
    )
    assert "bits=2 (mid-tread), group_size=-1, bias=False)" in repr(
        UniformLinear(8, 2, False, bits=2, mid_rise=False)
    )


def _changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**layer().state_dict(), name: value}


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "codes",
            torch.zeros(9, 21, dtype=torch.uint8),
            r"weight\.codes: expected shape \(9, 20\), got \(9, 21\)",
        ),
        ("codes", torch.zeros(9, 20), r"weight\.codes: expected torch\.uint8, got torch\.float32"),
        ("scale", torch.ones(9, 3).half(), r"weight\.scale: expected torch\.float32, got torch\.float16"),
        ("scale", torch.full((9, 3), torch.nan), r"weight\.scale: expected finite scales"),
        ("input_scale", torch.ones(5), r"weight\.input_scale: expected shape \(6,\), got \(5,\)"),
        (
            "input_scale",
            torch.ones(6).half(),
            r"weight\.input_scale: expected torch\.float32, got torch\.float16",
        ),
        (
            "input_offset",
            torch.full((40,), torch.inf),
            r"weight\.input_offset: expected finite values, got NaN",
        ),
    ],
)
def test_bad_state_is_refused(name: str, value: Tensor, match: str) -> None:
    new = layer()
    before = new.scale.clone()
    with pytest.raises(RuntimeError, match=match):
        new.load_state_dict(_changed(name, value))
    assert torch.equal(new.scale, before)


def test_missing_keys_are_named() -> None:
    with pytest.raises(RuntimeError, match="input_scale"):
        layer().load_state_dict(layer(quantized=False).state_dict())


CODES, STEP = torch.zeros(3, 8, dtype=torch.int8), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes": CODES.short()}, TypeError, r"codes: expected torch\.int8, got torch\.int16"),
        ({"codes": CODES[0]}, ValueError, r"codes: expected shape \[N, K\], got \(8,\)"),
        ({"codes": CODES + 2}, ValueError, "codes: expected -2 to 1 for 2 bits, got 2 to 2"),
        ({"codes": CODES - 3}, ValueError, "codes: expected -2 to 1 for 2 bits, got -3 to -3"),
        ({"scale": STEP[:2]}, ValueError, r"weight\.scale: expected shape \(3, 1\), got \(2, 1\)"),
        ({"scale": -STEP}, ValueError, r"weight\.scale: expected finite scales of at least 0"),
        ({"input_bits": 4}, ValueError, "input_scale, input_bits: expected both or neither"),
        ({"input_scale": STEP, "input_bits": 4}, ValueError, r"input_scale: expected shape \[1\] or \[T\]"),
        ({"bits": 9}, ValueError, "bits: expected 1 to 8, got 9"),
        ({"input_scale": STEP[0], "input_bits": 9}, ValueError, "input_bits: expected 1 to 8, got 9"),
        ({"input_offset": torch.zeros(8)}, ValueError, "input_bits: expected a number with an input_offset"),
        ({"codes": CODES[:0]}, ValueError, "in_features, out_features: expected at least 1, got 8, 0"),
        (
            {"input_scale": STEP[0, :0], "input_bits": 4},
            ValueError,
            "input_tokens: expected at least 1, got 0",
        ),
    ],
)
def test_bad_codes_are_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    good: dict[str, Any] = {"codes": CODES, "scale": STEP, "bits": 2, "mid_rise": True}
    UniformLinear.from_codes(**good)
    with pytest.raises(error, match=match):
        UniformLinear.from_codes(**{**good, **change})
