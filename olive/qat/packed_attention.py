"""Attention after training: projections and QKR's matrices as integers, quantizers as they were learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from olive.nn import UniformLinear
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.attention import QATAttention
from olive.qat.config import QATConfig
from olive.qat.layers import QATLinear
from olive.qat.merged import MergedWeight
from olive.qat.packed_merged import PackedMergedWeight
from olive.qat.packing import pack_linear, pack_weight
from olive.qat.weight_quantizers import StatsQ

QUANTIZERS = (
    "input_quantizer",
    "query_quantizer",
    "key_quantizer",
    "value_quantizer",
    "probability_quantizer",
)

ATTENTION_FIELDS = frozenset({"qkr", "per_token", "key_bias", "quantizers"})
_QUANTIZER_FIELDS = frozenset({"bits", "scales", "dim", "offset", "offset_after"})


def pack_attention(attention: QATAttention) -> QATAttention:
    """The attention of integers that computes what a trained one does; its quantizers are shared, and frozen.

    Args:
        attention: not changed, but for its quantizers, which no longer require gradients.
    """
    new = attention.twin()
    for name, child in attention._modules.items():
        if isinstance(child, QATLinear):
            new.register_module(name, pack_linear(child))
    merged, quantizer = attention.merged_weight, attention.input_quantizer
    if isinstance(merged, MergedWeight):
        query, key, value, *_ = attention.traits.projections
        del new._modules[query], new._modules[key]
        values = attention._modules[value]
        assert isinstance(values, QATLinear)
        new.register_module(value, pack_linear(values, quantizer))
        bias = None if attention.key_offset is None else attention.key_offset.detach()
        packed = pack_weight(
            merged.latent(), merged.weight_quantizer, bias, quantizer, _weight_dtype(attention)
        )
        u = merged.key_bias()
        new.merged_weight = PackedMergedWeight(packed, None if u is None else u.detach())
        new.register_parameter("key_offset", None)
    for module in new.modules():
        if isinstance(module, ActivationQuantizer):
            module.requires_grad_(False)
    return new


def _weight_dtype(attention: QATAttention) -> torch.dtype:
    """The dtype of the attention's float weights."""
    weight = attention.get_submodule(attention.traits.value).weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def describe_attention(attention: QATAttention) -> dict[str, Any]:
    """What `empty_attention` needs to know of a packed attention, as plain values."""
    quantizers = {name: getattr(attention, name) for name in QUANTIZERS}
    return {
        "qkr": attention.merged_weight is not None,
        "per_token": attention.per_token,
        "key_bias": attention.merged_weight is not None and attention.merged_weight.key_bias() is not None,
        "quantizers": {
            name: {
                "bits": one.bits,
                "scales": int(one.scale.shape[0]),
                "dim": one.dim,
                "offset": 0 if one.offset is None else int(one.offset.shape[0]),
                "offset_after": one.offset_after is not None,
            }
            for name, one in quantizers.items()
            if one is not None
        },
    }


def check_fields(values: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse a description that lacks a field, or has one that this version does not know.

    Raises:
        ValueError: such a description.
    """
    missing, unknown = sorted(set(expected) - set(values)), sorted(set(values) - set(expected))
    if missing or unknown:
        raise ValueError(f"expected fields {sorted(expected)}, got {missing} missing, {unknown} unknown")


def empty_attention(
    replaced: nn.Module, name: str, description: Mapping[str, Any], layers: Mapping[str, UniformLinear]
) -> QATAttention:
    """A packed attention without values.

    Args:
        replaced: the float attention.
        name: of it, for errors.
        description: from `describe_attention`.
        layers: empty projections by name, and `merged_weight` under QKR.

    Raises:
        ValueError: as `QATAttention.of`; another set of layers, quantizers or fields, or merged matrices
            of another size.
    """
    if unknown := sorted(set(description["quantizers"]) - set(QUANTIZERS)):
        raise ValueError(f"expected quantizers among {sorted(QUANTIZERS)}, got unknown {unknown}")
    for one in description["quantizers"].values():
        check_fields(one, _QUANTIZER_FIELDS)
    qkr = bool(description["qkr"])
    granularity = "per_token" if description["per_token"] else "per_tensor"
    config = QATConfig(
        activation_bits=8, activation_granularity=granularity, qkr=qkr, quantize_attention=not qkr
    )
    new = QATAttention.of(replaced, config, name, lambda linear: QATLinear.of(linear, StatsQ(1)))
    check_fields(layers, {*new.traits.projections[2:], "merged_weight"} if qkr else new.traits.projections)
    device = layers[new.traits.value].codes.device
    if qkr:
        columns = layers[new.traits.value].in_features
        found = layers["merged_weight"].out_features, layers["merged_weight"].in_features
        if found != (new.heads * columns, columns):
            raise ValueError(f"merged_weight: expected {(new.heads * columns, columns)}, got {found}")
        for key in new.traits.projections[:2]:
            del new._modules[key]
        u = torch.empty(new.heads, layers["merged_weight"].in_features, device=device)
        packed = PackedMergedWeight(layers["merged_weight"], u if description["key_bias"] else None)
        new.merged_weight = packed
    for key in new.traits.projections[2:] if qkr else new.traits.projections:
        new.register_module(key, layers[key])
    for key in QUANTIZERS:
        setattr(new, key, _empty_quantizer(description["quantizers"].get(key), device))
    for parameter in new.parameters():
        parameter.requires_grad_(False)
    return new


def _empty_quantizer(values: Mapping[str, Any] | None, device: torch.device) -> ActivationQuantizer | None:
    if values is None:
        return None
    new = ActivationQuantizer(
        values["bits"], shape=values["scales"], dim=values["dim"], channels=values["offset"], device=device
    )
    if not values["offset_after"]:
        new.offset_after = None
    return new
