"""`prepare`: exchange the layers of a model for ones that train on levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from olive.frameworks import framework_models
from olive.nn.ovp_weight import OVPWeight
from olive.ops.schemas import FLOATS
from olive.ptq.batches import run_batches
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.attention import QATAttention
from olive.qat.attention_classes import ATTENTIONS, find_attentions, projections_of, unknown_attentions
from olive.qat.config import QATConfig
from olive.qat.latent import LatentWeight
from olive.qat.layers import QATConv1D, QATConv2d, QATEmbedding, QATLayer, QATLinear
from olive.qat.selection import Layer, Selection, select
from olive.qat.undo import keeps_requires_grad
from olive.qat.weight_quantizers import LSQWeight, MinMax, StatsQ, WeightQuantizer
from olive.walk import check_skip, exchange, skip_matches

_CONFIG = "_olive_qat_config"
_READY = "_olive_qat_ready"


def prepare(model: nn.Module, config: QATConfig | None = None, *, batch: Any = None) -> nn.Module:
    """Make a model train on quantized weights, and activations if asked to, in place.

    Linear layers, transformers' `Conv1D`, convolutions and the input embedding are exchanged for layers that
    quantize in the forward pass; parameters stay the same objects under the same names. Build the optimizer
    afterwards: learned scales and offsets are parameters too. `olive.qat.select` says what is left alone
        and why.

    Args:
        model: float, from transformers or not.
        config: how; None = `QATConfig()`.
        batch: what the model is run on once, to set the scales of activations: a mapping
            (`model(**batch)`), a tuple or list (`model(*batch)`) or a tensor (`model(batch)`). Needed for
            "per_token" scales and before FSDP2; otherwise the first forward pass sets them.

    Returns:
        The model. On any error it is left as it was.

    Raises:
        TypeError: model or config of another type, or a weight that is not float32, bfloat16 or float16.
        ValueError: a model that is prepared or quantized already, NaN or Inf in a weight, nothing to
            quantize, a name in `skip` that the model does not have, an attention that cannot be quantized
            as asked, or no batch where one is needed.
    """
    config = QATConfig() if config is None else config
    _check(model, config, batch)
    selection = select(model, config)
    _check_layers(model, config, selection)
    with keeps_requires_grad(model):  # attention under qkr changes it
        undo = exchange(model, _replacements(model, config, selection))
        try:
            if batch is not None:
                for _ in run_batches(model, [batch]):
                    pass
                _check_reached(model)
            for framework, wrapped in framework_models(model):
                if framework.mark_prepared is not None:
                    framework.mark_prepared(wrapped)
        except BaseException:  # Ctrl-C too
            undo()
            raise
    vars(model)[_CONFIG] = config
    model.register_forward_pre_hook(_refuse_unset_shards)
    return model


def prepared_config(model: nn.Module) -> QATConfig | None:
    """What a model was prepared with; None = it is not prepared."""
    return vars(model).get(_CONFIG)


def unprepare(model: nn.Module) -> None:
    """Forget on the model that it was prepared, once its layers are exchanged."""
    for name in (_CONFIG, _READY):
        vars(model).pop(name, None)
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse_unset_shards]:
        del hooks[key]


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every quantizer of activations by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


def _check(model: object, config: object, batch: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, QATConfig):
        raise TypeError(f"config: expected an olive.qat.QATConfig, got {type(config).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, LatentWeight):
            raise ValueError(
                f"model: expected a float model, got one that is prepared already ({name or 'itself'}); "
                f"prepare it once, or load it anew"
            )
        if isinstance(module, OVPWeight):
            raise ValueError(
                f"model: expected a float model, got quantized {name or 'model'}; "
                f"call olive.dequantize(model) first"
            )
    if batch is None and config.activation_granularity == "per_token":
        raise ValueError(
            "batch: expected one for activation_granularity 'per_token', whose scales are one per position, "
            "got None; pass prepare(model, config, batch=...)"
        )


def _check_layers(model: nn.Module, config: QATConfig, selection: Selection) -> None:
    check_skip(model, config.skip)
    if any(layer.module is model for layer in selection.layers):
        raise ValueError(
            f"model: expected a model with layers in it, got a single {type(model).__name__}, which cannot "
            f"be exchanged in place; wrap it in nn.Sequential"
        )
    if not any(layer.role == "body" for layer in selection.layers):
        reasons = sorted({one.reason for one in selection.skipped})
        raise ValueError(
            f"model: expected a layer to quantize besides the first and the last, got none "
            f"({'; '.join(reasons) or 'no parameters'})"
        )
    for layer in selection.layers:
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        if weight.dtype not in FLOATS:
            raise TypeError(f"{layer.name}.weight: expected float32, bfloat16 or float16, got {weight.dtype}")
        check_finite(layer.name, weight)
        bits = config.first_last_bits if layer.role == "ends" else config.activation_bits
        padded = isinstance(layer.module, nn.Conv2d) and any(layer.module.padding)
        if padded and config.activation_bits is not None and bits == 1:
            raise ValueError(
                f"{layer.name}: expected more than 1 bit for the input of a convolution that pads with "
                f"zeros, because levels of 1 bit have no zero; put it into skip"
            )


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight without values, or with NaN or infinity.

    Raises:
        ValueError: with the layer's name.
    """
    if weight.is_meta:
        raise ValueError(f"{name}.weight: expected values, got a weight on the meta device; load it first")
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"{name}.weight: expected finite values, got NaN or Inf")


def _replacements(model: nn.Module, config: QATConfig, selection: Selection) -> dict[nn.Module, nn.Module]:
    """New modules for attentions with the layers in them, if they are asked for, and for all other layers."""
    layers = {layer.module: layer for layer in selection.layers}

    def make_linear(linear: nn.Linear) -> QATLinear:
        new = quantized_layer(layers.pop(linear), config)
        assert isinstance(new, QATLinear)
        return new

    new: dict[nn.Module, nn.Module] = {}
    if config.qkr or config.quantize_attention:
        for name, module in _attentions(model, config).items():
            missing = [key for key in projections_of(module) if module._modules[key] not in layers]
            if missing:
                raise ValueError(
                    f"{name}: expected projections that are all quantized, got {', '.join(missing)} left "
                    f"out; put the whole attention into skip, or none of its projections"
                )
            new[module] = QATAttention.of(module, config, name, make_linear)
            for key in projections_of(module):
                layers.pop(module.get_submodule(key), None)  # merged ones
    return {**new, **{module: quantized_layer(layer, config) for module, layer in layers.items()}}


def _attentions(model: nn.Module, config: QATConfig) -> dict[str, nn.Module]:
    """Attentions to quantize.

    Raises:
        ValueError: one of a class that is not known, or no attention at all.
    """
    asked = "qkr" if config.qkr else "quantize_attention"
    unknown = [name for name in unknown_attentions(model) if skip_matches(name, config.skip) is None]
    if unknown:
        cls = type(model.get_submodule(unknown[0])).__name__
        raise ValueError(
            f"{unknown[0]}: expected an attention that {asked} knows ({', '.join(sorted(ATTENTIONS))}), got "
            f"{cls}; use {asked}=False, or put it into skip"
        )
    found = {
        name: module
        for name, module in find_attentions(model).items()
        if skip_matches(name, config.skip) is None
    }
    if not found:
        raise ValueError(
            f"{asked}: expected a model with attention of a known class ({', '.join(sorted(ATTENTIONS))}), "
            f"got a {type(model).__name__} without; use {asked}=False"
        )
    return found


def quantized_layer(layer: Layer, config: QATConfig) -> QATLayer:
    """The layer that takes a float layer's place; its parameters are the same objects."""
    module = layer.module
    kinds: dict[type[nn.Module], type[QATLayer]] = {
        nn.Linear: QATLinear,
        nn.Conv2d: QATConv2d,
        nn.Embedding: QATEmbedding,
    }
    kind = next((new for base, new in kinds.items() if isinstance(module, base)), QATConv1D)
    weight_quantizer = _weight_quantizer(layer, kind, config)
    bits = config.activation_bits
    if bits is None or kind is QATEmbedding:
        return kind.of(module, weight_quantizer)
    assert isinstance(module.weight, Tensor)
    ends, per_token = layer.role == "ends", config.activation_granularity == "per_token"
    columns = int(module.weight.shape[0 if kind is QATConv1D else 1])
    # At an end the input has no positions: images, or what a head reads of one.
    input_quantizer = ActivationQuantizer(
        (config.first_last_bits or bits) if ends else bits,
        shape=0 if per_token and not ends and kind is not QATConv2d else 1,
        dim=-2,
        channels=columns if config.activation_offsets and kind is not QATConv2d and not ends else 0,
        device=module.weight.device,
    )
    return kind.of(module, weight_quantizer, input_quantizer)


def _weight_quantizer(layer: Layer, kind: type[QATLayer], config: QATConfig) -> WeightQuantizer:
    if layer.role == "ends":
        assert config.first_last_bits is not None
        return MinMax(config.first_last_bits)
    if config.weights == "statsq":
        return StatsQ(config.weight_bits, config.group_size)
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return LSQWeight(config.weight_bits, weight.t() if kind is QATConv1D else weight)


def _check_reached(model: nn.Module) -> None:
    missing = [name for name, one in quantizers(model).items() if not one.is_initialized]
    if missing:
        raise ValueError(f"batch: expected data that reaches every layer, got none at {', '.join(missing)}")


def _refuse_unset_shards(model: nn.Module, args: Any) -> None:
    """A forward pre-hook: scales that lie in shards cannot be set in the first forward pass."""
    if torch.compiler.is_compiling() or vars(model).get(_READY):
        return
    found = quantizers(model).values()
    for one in found:
        if not one.is_initialized:
            one.refresh()  # a checkpoint may have been loaded in place
    if all(one.is_initialized for one in found):
        vars(model)[_READY] = True
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise RuntimeError(
            "model: expected scales of activations that are set before fully_shard, got unset ones; pass "
            "olive.qat.prepare(model, config, batch=...), or run one batch before sharding"
        )
