"""`convert`: exchange the layers of a trained model for ones that hold integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from olive.config import QuantConfig
from olive.frameworks import framework_models
from olive.nn import UniformConv2d, UniformEmbedding
from olive.nn.origin import take_over
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.attention import QATAttention
from olive.qat.config import QATConfig
from olive.qat.latent import LatentWeight
from olive.qat.layers import QATConv2d, QATEmbedding, QATLayer
from olive.qat.packed_attention import pack_attention
from olive.qat.packing import folded_bias, pack_linear
from olive.qat.preparation import check_finite, prepared_config, quantizers, unprepare
from olive.qat.undo import keeps_requires_grad
from olive.qat.weight_quantizers import LSQWeight, MinMax
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
        ValueError: a model that is not prepared, or is sharded, scales of activations that no batch has set,
            NaN or Inf in a weight or scale, another target, or "ovp" after training with `qkr`.
    """
    prepared = _check(model, to, config)
    ends = [
        name
        for name, one in model.named_modules()
        if isinstance(one, QATLayer) and isinstance(one.weight_quantizer, MinMax)
    ]
    new: Callable[[QATLayer | QATAttention], nn.Module] = _packed if to == "uniform" else _float
    with keeps_requires_grad(model):  # quantizers in attention no longer require it
        with torch.no_grad():
            undo = exchange(model, {module: new(module) for module in _exchanged(model)})
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
        if any(isinstance(module, LatentWeight) for module in model.modules()):
            raise ValueError(
                f"model: expected the model that was prepared, got a {type(model).__name__} around it; pass "
                f"the model inside (torch.compile: `_orig_mod`, DDP: `module`, PEFT: `get_base_model()`)"
            )
        raise ValueError("model: expected a prepared model, got another; call olive.qat.prepare and train it")
    for name, module in model.named_modules():
        if isinstance(module, LatentWeight):
            if module.is_sharded:
                raise ValueError(
                    f"{name}.weight: expected a whole weight, got one that processes share; gather the state "
                    f"dict, and load it into a prepared model that is not sharded"
                )
            check_finite(name, module.latent())
        if isinstance(module, (ActivationQuantizer, LSQWeight)):
            for key, parameter in module.named_parameters(recurse=False):
                if not bool(torch.isfinite(parameter.detach()).all()):
                    raise ValueError(f"{name}.{key}: expected finite values, got NaN or Inf")
    unset = [name for name, one in quantizers(model).items() if not one.is_initialized]
    if unset:
        raise ValueError(
            f"model: expected scales of activations that a batch has set, got none at {', '.join(unset[:3])}"
            f"{' and others' if len(unset) > 3 else ''}; train the model, or run a batch, before convert"
        )
    return prepared


def _exchanged(model: nn.Module) -> Iterator[QATLayer | QATAttention]:
    """What is exchanged: attentions as a whole, and the layers outside of them."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, QATAttention):
            inside.update(module.modules())
            yield module
        elif isinstance(module, QATLayer) and module not in inside:
            yield module


def _packed(module: QATLayer | QATAttention) -> nn.Module:
    """The module of integers that computes what a trained one does."""
    if isinstance(module, QATAttention):
        return pack_attention(module)
    new: nn.Module = pack_linear(module)
    if isinstance(module, QATEmbedding):
        new = UniformEmbedding(new)  # type: ignore[arg-type]
    elif isinstance(module, QATConv2d):
        assert not isinstance(module.padding, str)
        new = UniformConv2d(new, module.kernel_size, module.stride, module.padding)  # type: ignore[arg-type]
    take_over(new, module)
    return new


def _float(module: QATLayer | QATAttention) -> nn.Module:
    """The float module; weights of few bits lie on their levels."""
    if isinstance(module, QATAttention):
        if module.merged_weight is not None:
            raise ValueError(
                "to: expected 'uniform' after training with qkr, got 'ovp', which has no counterpart to "
                "matrices that are merged from queries and keys"
            )
        attention = module.to_float()
        for name, child in module._modules.items():
            if isinstance(child, QATLayer):
                attention.register_module(name, _float(child))
        return attention
    new = module.to_float()
    if isinstance(module.weight_quantizer, MinMax):
        return new
    weight, quantizer = module.quantized_weight().detach(), module.input_quantizer
    new.weight = nn.Parameter(module.channels_first(weight), module.weight.requires_grad)
    if quantizer is not None and quantizer.offset is not None and quantizer.offset_after is not None:
        offset = quantizer.offset + quantizer.offset_after
        bias = folded_bias(weight, module._parameters.get("bias"), offset, weight.dtype)
        new.register_parameter("bias", bias)
    return new


def _ovp_config(ends: list[str], prepared: QATConfig) -> QuantConfig:
    """The default, on the layers that were trained on few bits."""
    return QuantConfig(skip=(*QuantConfig.skip, *prepared.skip, *ends))
