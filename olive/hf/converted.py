"""What a checkpoint says of layers that hold integers, and how such layers are built from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from olive.nn import UniformConv2d, UniformEmbedding, UniformLinear
from olive.nn.origin import take_over
from olive.qat.attention import QATAttention
from olive.qat.packed_attention import ATTENTION_FIELDS, check_fields, describe_attention, empty_attention
from olive.qat.packed_merged import PackedMergedWeight

WHERE = "quantization_config.layers"
_SIZES = ("kernel_size", "stride", "padding")
_LINEAR = frozenset(
    {"in_features", "out_features", "bias", "bits", "mid_rise", "group_size"}
    | {"input_bits", "input_signed", "input_tokens", "input_offset"}
)
_FIELDS = {
    "linear": _LINEAR,
    "embedding": _LINEAR,
    "conv2d": _LINEAR | set(_SIZES),
    "attention": ATTENTION_FIELDS | {"layers"},
}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every layer of integers by its full name: kind, and what it is built with, as plain values."""
    found: dict[str, dict[str, Any]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, QATAttention):
            inside.update(module.modules())
            layers = describe_layers(module)
            found[name] = {"kind": "attention", **describe_attention(module), "layers": layers}
        elif isinstance(module, UniformEmbedding):
            found[name] = {"kind": "embedding", **_packed(module.packed)}
            inside.add(module.packed)
        elif isinstance(module, UniformConv2d):
            sizes = {key: list(getattr(module, key)) for key in _SIZES}
            found[name] = {"kind": "conv2d", **_packed(module.packed), **sizes}
            inside.add(module.packed)
        elif isinstance(module, UniformLinear):
            found[name] = {"kind": "linear", **_packed(module)}
    return found


def describe_layers(attention: QATAttention) -> dict[str, dict[str, Any]]:
    """The layers of a packed attention, by the name of the projection, or `merged_weight`."""
    children = attention._modules.items()
    layers = {name: module for name, module in children if isinstance(module, UniformLinear)}
    if isinstance(attention.merged_weight, PackedMergedWeight):
        layers["merged_weight"] = attention.merged_weight.packed
    return {name: _packed(layer) for name, layer in layers.items()}


def _packed(layer: UniformLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "bits": layer.bits,
        "mid_rise": layer.mid_rise,
        "group_size": layer.group_size,
        "input_bits": layer.input_bits,
        "input_signed": layer.input_signed,
        "input_tokens": 1 if layer.input_scale is None else int(layer.input_scale.shape[0]),
        "input_offset": layer.input_offset is not None,
    }


def build(name: str, description: Mapping[str, Any], replaced: nn.Module) -> nn.Module:
    """An empty layer in the place of a float one, on its device.

    Args:
        name: of the layer, for errors.
        description: from `describe`.
        replaced: the float layer.

    Raises:
        ValueError: a kind, a field or a value that this version does not know, or a layer of another size.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    try:
        if kind in _FIELDS:
            check_fields(values, _FIELDS[kind])
        if kind == "attention":
            new = _attention(name, values, replaced)
        elif kind in ("linear", "embedding", "conv2d"):
            new = _layer(kind, values, replaced)
        else:
            raise ValueError(f"expected kind linear, embedding, conv2d or attention, got {kind!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{WHERE}.{name}: {error}") from None
    take_over(new, replaced)
    for module in new.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not fill it
    return new


def _layer(kind: str, values: dict[str, Any], replaced: nn.Module) -> nn.Module:
    sizes = {key: tuple(values.pop(key)) for key in _SIZES if key in values}
    packed = _empty(values, replaced)
    if kind == "linear":
        return packed
    return UniformEmbedding(packed) if kind == "embedding" else UniformConv2d(packed, **sizes)


def _empty(values: Mapping[str, Any], replaced: nn.Module) -> UniformLinear:
    """A layer without values, of the size of a float one."""
    weight = getattr(replaced, "weight", None)
    size = values["out_features"], values["in_features"]
    if weight is None or size not in _shapes(weight):
        raise ValueError(
            f"expected a layer of the model's size, {type(replaced).__name__} "
            f"{None if weight is None else tuple(weight.shape)}, got {size}"
        )
    return UniformLinear(**values, device=weight.device, dtype=weight.dtype)


def _attention(name: str, values: dict[str, Any], replaced: nn.Module) -> nn.Module:
    for layer in values["layers"].values():
        check_fields(layer, _LINEAR)
    weight = next(replaced.parameters())
    layers = {
        key: _empty(layer, replaced.get_submodule(key))
        if key in replaced._modules
        else UniformLinear(**layer, device=weight.device, dtype=weight.dtype)
        for key, layer in values["layers"].items()
    }
    return empty_attention(replaced, name, values, layers)


def _shapes(weight: Any) -> tuple[tuple[int, int], ...]:
    """(N, K) of a float weight: as it is, and as transformers' Conv1D holds it."""
    rows, columns = int(weight.shape[0]), int(weight[0].numel())
    return (rows, columns), (columns, rows)
