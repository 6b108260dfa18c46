"""`convert`: exchange the layers of a trained model for ones that hold integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from olive.config import QuantConfig
from olive.frameworks import framework_models
from olive.nn import UniformConv2d, UniformEmbedding, UniformLinear
from olive.nn.origin import take_over
from olive.qat.config import QATConfig
from olive.qat.latent import LatentWeight
from olive.qat.layers import QATConv2d, QATEmbedding, QATLayer
from olive.qat.preparation import check_finite, prepared_config, quantizers, unprepare
from olive.qat.weight_quantizers import MinMax
from olive.quantization import quantize
from olive.walk import exchange

TARGETS = ("uniform", "ovp")


def convert(model: nn.Module, *, to: str = "uniform", config: QuantConfig | None = None) -> nn.Module:
    """End quantization-aware training: keep integers in place of the latent weights, in place.

    Args:
        model: prepared and trained.
        to: "uniform": integer codes of the trained bits, computing with the learned scales of activations, so
            that outputs stay what they were up to the rounding of sums. "ovp": outlier-victim pairs of 4 or 8
            bits instead, as `olive.quantize` makes them of the trained weights' levels; scales of activations
            are dropped, and the first and last layers stay float.
        config: of "ovp"; None = `QuantConfig()` for the layers that were trained on few bits.

    Returns:
        The model. On any error it is left as it was.

    Raises:
        TypeError: model or config of another type.
        ValueError: a model that is not prepared, scales of activations that no batch has set, NaN or Inf in a
            weight, or another target.
    """
    prepared = _check(model, to, config)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, QATLayer)}
    ends = [name for name, one in layers.items() if isinstance(one.weight_quantizer, MinMax)]
    new: Callable[[QATLayer], nn.Module] = packed_layer if to == "uniform" else _float_layer
    with torch.no_grad():
        undo = exchange(model, {layer: new(layer) for layer in layers.values()})
    try:
        if to == "ovp":
            quantize(model, _ovp_config(ends, prepared) if config is None else config)
        else:
            for framework, wrapped in framework_models(model):
                if framework.mark_converted is not None:
                    framework.mark_converted(wrapped)
    except BaseException:  # Ctrl-C too
        undo()
        raise
    unprepare(model)
    return model


def _check(model: object, to: str, config: object) -> QATConfig:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(map(repr, TARGETS))}, got {to!r}")
    if config is not None and to != "ovp":
        raise ValueError(f"config: expected None with to={to!r}, whose bits training has fixed, got one")
    if (prepared := prepared_config(model)) is None:
        raise ValueError("model: expected a prepared model, got another; call olive.qat.prepare and train it")
    for name, module in model.named_modules():
        if isinstance(module, LatentWeight):
            check_finite(name, module.latent())
    unset = [name for name, one in quantizers(model).items() if not one.is_initialized]
    if unset:
        raise ValueError(
            f"model: expected scales of activations that a batch has set, got none at {', '.join(unset[:3])}"
            f"{' and others' if len(unset) > 3 else ''}; train the model, or run a batch, before convert"
        )
    return prepared


def packed_layer(layer: QATLayer) -> nn.Module:
    """The layer of integers that computes what a trained layer does."""
    packed = _packed(layer)
    if isinstance(layer, QATEmbedding):
        new: nn.Module = UniformEmbedding(packed)
    elif isinstance(layer, QATConv2d):
        assert not isinstance(layer.padding, str)
        new = UniformConv2d(packed, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
    else:
        new = packed
    take_over(new, layer)
    return new


def _packed(layer: QATLayer) -> UniformLinear:
    weight, quantizer = layer.latent(), layer.input_quantizer
    codes, step, mid_rise, group_size = layer.weight_quantizer.integers(weight)
    packed = UniformLinear.from_codes(
        codes,
        step,
        _folded_bias(layer, None if quantizer is None else quantizer.offset_after),
        bits=layer.weight_quantizer.bits,
        mid_rise=mid_rise,
        group_size=group_size,
        input_scale=None if quantizer is None else quantizer.scale.detach().float(),
        input_offset=_detached(None if quantizer is None else quantizer.offset),
        input_bits=None if quantizer is None else quantizer.bits,
        input_signed=quantizer is None or quantizer.is_signed,
        dtype=weight.dtype,
    )
    return packed.train(layer.training)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _folded_bias(layer: QATLayer, offset: Tensor | None) -> nn.Parameter | None:
    """The bias with what an offset of the layer's input adds to every output."""
    bias = layer._parameters.get("bias")
    if offset is None:
        return bias
    added = layer.quantized_weight().float() @ offset.float()
    total: Tensor = added if bias is None else bias.float() + added
    dtype = layer.weight.dtype if bias is None else bias.dtype
    return nn.Parameter(total.detach().to(dtype), requires_grad=bias is not None and bias.requires_grad)


def _float_layer(layer: QATLayer) -> nn.Module:
    """The float layer; a weight of few bits lies on its levels."""
    new = layer.to_float()
    if isinstance(layer.weight_quantizer, MinMax):
        return new
    new.weight = nn.Parameter(layer.channels_first(layer.quantized_weight()), layer.weight.requires_grad)
    quantizer = layer.input_quantizer
    if quantizer is not None and quantizer.offset is not None and quantizer.offset_after is not None:
        new.register_parameter("bias", _folded_bias(layer, quantizer.offset + quantizer.offset_after))
    return new


def _ovp_config(ends: list[str], prepared: QATConfig) -> QuantConfig:
    """The default, on the layers that were trained on few bits."""
    return QuantConfig(skip=(*QuantConfig.skip, *prepared.skip, *ends))
