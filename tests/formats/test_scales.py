"""Stored scales: seven significant bits and the rule bit, which no cast of a model can touch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from olive.formats import pack_scale, round_scale, unpack_scale
from olive.nn import OVPLinear

PATTERNS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


def test_all_patterns_of_finite_scales_round_trip() -> None:
    value, plain = unpack_scale(PATTERNS)
    finite = torch.isfinite(value)
    assert int(finite.sum()) == 2**16 - 2 * 2**7  # all but the exponent of Inf and NaN
    assert torch.equal(pack_scale(value, plain)[finite], PATTERNS[finite])
    assert torch.equal(round_scale(value[finite]), value[finite])


def test_value_is_the_bfloat16_without_its_lowest_bit() -> None:
    value, plain = unpack_scale(PATTERNS)
    bfloat16 = (PATTERNS & -2).view(torch.bfloat16).float()
    assert torch.equal(value.view(torch.int32), bfloat16.view(torch.int32))
    assert torch.equal(plain, PATTERNS % 2 != 0)


def test_rounding_is_to_the_nearest_ties_to_even() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2000, generator=generator) * torch.logspace(-30, 30, 2000)
    midway = torch.tensor([(2 * n + 1) / 128 for n in range(64, 128)])  # halfway between neighbours in 1..2
    values = torch.cat((random, midway, -midway, torch.nextafter(midway, midway + 1)))
    for value, rounded in zip(values.tolist(), round_scale(values).tolist(), strict=True):
        mantissa, exponent = math.frexp(value)  # |mantissa| in 1/2..1
        assert rounded == math.ldexp(round(mantissa * 128), exponent - 7)  # Python rounds ties to even


def test_rounding_takes_any_shape_and_stride() -> None:
    values = torch.rand(6, 4).t()
    assert torch.equal(round_scale(values), round_scale(values.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rule_bits_survive_a_cast_of_the_model(dtype: torch.dtype) -> None:
    layer = OVPLinear(64, 4, group_size=32)
    scale = torch.tensor([[0x3C4B, 0x3C4A], [0x3C49, 0x3F80], [-0x43B5, 0x0001], [0x7F7F, 0x2181]])
    layer.scale.data.copy_(scale.to(torch.int16))
    layer.codes.data.copy_(torch.arange(4 * 32).reshape(4, 32))
    layer.codebook.data.zero_()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model = nn.Sequential(layer, nn.Linear(4, 2))
    casts = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float32: model.float}
    for cast in (lambda: model.to(dtype), casts.get(dtype, model.double)):
        cast()
        assert model[1].weight.dtype == dtype
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
        for name in ("codes", "scale", "codebook"):
            after = model.state_dict()[f"0.{name}"]
            assert after.dtype == before[name].dtype
            assert torch.equal(after, before[name])
