"""`olive.quantize` and `olive.dequantize`: exchange the modules of a model for quantized ones, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from olive._progress import ProgressBar
from olive.config import PAPER_CODEBOOKS, QuantConfig
from olive.formats import LEARNED, PAPER, PER_TENSOR
from olive.frameworks import framework_models
from olive.nn import OVPExperts, OVPLinear, OVPWeight
from olive.ops.schemas import FLOATS
from olive.ptq import quantize_weight, quantize_weight8
from olive.ptq.activations import activation_figures, static_scale
from olive.ptq.batches import check_batches, run_batches
from olive.ptq.calibration import InputCollector, InputSample
from olive.ptq.noise import column_energies, decibels, energies
from olive.walk import Inventory, attach_config, attached_config, check_skip, exchange, walk


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a stack, in the canonical layout, with the quality it has.

    Args:
        codes: uint8 [N, ceil(K / 2)] or [E, N, ceil(K / 2)]; for 8 bits 2 ceil(K / 2) bytes a row.
        scale: int16 [N, G] or [E, N, G].
        codebook: int8 [32]; None for 8 bits.
        sqnr_db: signal-to-quantization-noise ratio in dB, inf if the codes hold the weight exactly.
    """

    codes: Tensor
    scale: Tensor
    codebook: Tensor | None
    sqnr_db: float


def quantize_parameter(
    parameter: Tensor,
    config: QuantConfig,
    *,
    transposed: bool = False,
    name: str = "weight",
    advance: Callable[[int], None] | None = None,
) -> StoredWeight:
    """Quantize one float parameter of a model, on the device it is on.

    Args:
        parameter: float32, bfloat16 or float16 [N, K], or a stack [E, N, K].
        config: how.
        transposed: the parameter is laid out [..., K, N].
        name: what to call it in errors.
        advance: called with the number of values done, for a progress bar.

    Raises:
        ValueError: NaN or Inf in it, or a wrong shape.
        TypeError: not a float type.
    """
    weight = parameter.detach()
    if transposed:
        weight = weight.transpose(-1, -2)
    if weight.dim() == 3 and config.codebook == LEARNED:
        return _quantize_as_one(weight, config, name, advance)
    if weight.dim() == 3 and config.codebook == PAPER:  # a stack has one codebook
        options: dict[str, Any] = {"transposed": transposed, "name": name}
        first, second = (replace(config, codebook=book) for book in PAPER_CODEBOOKS)
        one = quantize_parameter(parameter, first, **options)
        other = quantize_parameter(parameter, second, **options, advance=advance)
        return other if other.sqnr_db > one.sqnr_db else one
    if weight.dim() == 2:
        codes, scale, table = _quantize_matrix(weight, config, name)
        signal, noise = energies(weight, codes, scale, table, config.group_size)
    else:
        parts = []
        signal = noise = 0.0
        for index, expert in enumerate(weight):
            part = _quantize_matrix(expert, config, f"{name}[{index}]")
            more = energies(expert, *part, config.group_size)
            signal, noise = signal + more[0], noise + more[1]
            parts.append(part)
            if advance is not None:
                advance(expert.numel())
        codes, scale = (
            torch.stack([part[0] for part in parts]),
            torch.stack([part[1] for part in parts]),
        )
        table = parts[0][2]
    if advance is not None and weight.dim() == 2:
        advance(weight.numel())
    return StoredWeight(codes, scale, table, decibels(signal, noise))


def _quantize_matrix(weight: Tensor, config: QuantConfig, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and codebook (None for 8 bits) of one weight [N, K]."""
    if config.bits == 8:
        return (*quantize_weight8(weight.contiguous(), config, name=name), None)
    codes, scale, codebook = quantize_weight(weight.contiguous(), config, name=name)
    return codes, scale, codebook


def _quantize_as_one(
    weight: Tensor, config: QuantConfig, name: str, advance: Callable[[int], None] | None
) -> StoredWeight:
    """A stack [E, N, K] as one tall weight [E x N, K]: its experts share one fitted codebook."""
    experts, rows, columns = weight.shape
    tall = weight.reshape(experts * rows, columns).contiguous()
    codes, scale, table = quantize_weight(tall, config, name=name)
    signal, noise = energies(tall, codes, scale, table, config.group_size)
    if config.group_size == PER_TENSOR:
        scale = scale.expand(experts, 1).contiguous()
    if advance is not None:
        advance(weight.numel())
    return StoredWeight(
        codes.view(experts, rows, -1),
        scale.view(experts, -1, scale.shape[-1]),
        table,
        decibels(signal, noise),
    )


def quantize(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize the weights of a model to 4 or 8 bits, and the inputs of its layers if asked to, in place.

    Linear layers, transformers' `Conv1D` and the fused experts of mixture-of-experts models are exchanged for
    quantized modules; everything else stays (`olive.report` lists it with the reasons). Weights need no data.

    Args:
        model: a PyTorch model, from transformers or not, with its weights in float32, bfloat16 or float16.
        config: how; None = `QuantConfig()`.
        calibration: data on which the float model is run once, in eval mode: an iterable of mappings
            (`model(**batch)`), tuples or lists (`model(*batch)`), tensors (`model(batch)`) or texts. Static
            activation scales need it; with dynamic ones it only fills the report.
        tokenizer: for texts; None = the one beside the checkpoint that a transformers model came from.
        progress: show a bar on stderr if it takes longer than two seconds; None = only on a terminal.

    Returns:
        The model. On any error, and on Ctrl-C, it is left exactly as it was.

    Raises:
        TypeError: model, config, calibration or a batch of another type, or a weight of another dtype.
        ValueError: nothing to quantize, a model that is quantized already, a weight on the meta device, NaN
            or Inf in a weight or in what reaches a layer, a name in `skip` that the model does not have, or
            calibration data that is missing, empty, or not needed.

    Warns:
        UserWarning: layers that the calibration data never reached; their scales are dynamic, one per token.
    """
    config = QuantConfig() if config is None else config
    _check_arguments(model, config, calibration, tokenizer)
    inventory = walk(model, config)
    _check_inventory(model, config, inventory)
    samples = {} if calibration is None else _calibrate(model, inventory, calibration, tokenizer, progress)
    replacements: dict[nn.Module, nn.Module] = {}
    with ProgressBar("quantizing", inventory.quantizable_values, progress) as bar:
        for target in inventory.targets:
            new = target.replacement(config)
            parameters = target.parameters()
            for name, weight in target.weights(new).items():
                stored = quantize_parameter(
                    parameters[name], config, transposed=weight.transposed, name=name, advance=bar.advance
                )
                weight.set_(stored.codes, stored.scale, stored.codebook)
                weight.sqnr_db = stored.sqnr_db
                if name in samples:
                    _set_activations(weight, samples.pop(name), parameters[name])
                weight.pack_()
            replacements[target.module] = new
    if calibration is not None:
        _warn_of_unreached(replacements, inventory)  # before the exchange: a warning may be an error
    _exchange(model, replacements, lambda: _mark(model, config), lambda: _unmark(model))
    return model


def _calibrate(
    model: nn.Module,
    inventory: Inventory,
    calibration: Iterable[Any],
    tokenizer: Any,
    progress: bool | None,
) -> dict[str, InputSample]:
    """Run the float model and sample the inputs of its targets, by the name of each weight."""
    linears, experts, sorted_experts = {}, {}, set()
    for target in inventory.targets:
        names = tuple(target.parameters())
        if len(names) == 1:
            linears[names[0]] = target.module  # a layer, which has one weight
        else:
            first, down = names
            experts[first, down] = target.module
            if target.kind == "sorted_experts":
                sorted_experts.add((first, down))
    collector = InputCollector(linears, experts, frozenset(sorted_experts))
    total = len(calibration) if isinstance(calibration, Sized) else 0
    done = 0
    with ProgressBar("calibrating", total, progress) as bar, collector.collecting():
        for done in run_batches(model, calibration, tokenizer):  # noqa: B007 (used below)
            collector.end_batch()
            bar.advance(1)
    if not done:
        raise ValueError("calibration: expected at least one batch or text with a token, got none")
    return collector.samples()


def _set_activations(weight: OVPWeight, sample: InputSample, parameter: Tensor) -> None:
    """Give a weight the static scale of its input, if it wants one, and the figures of the sample."""
    format, codebook, scale = weight.activations, weight.activation_codebook, None
    assert format is not None
    if format.is_static:
        energy = None
        if format.pairing != "paper":
            float_weight = parameter.detach()
            energy = column_energies(float_weight.transpose(-1, -2) if weight.transposed else float_weight)
        scale, codebook = static_scale(sample, format, energy, weight.codes.device)
        weight.set_activations_(scale, codebook)
    weight.activation_figures = activation_figures(sample, format, codebook, scale)


def _warn_of_unreached(replacements: dict[nn.Module, nn.Module], inventory: Inventory) -> None:
    unreached = [
        name
        for target in inventory.targets
        for name, weight in target.weights(replacements[target.module]).items()  # type: ignore[arg-type]
        if weight.activation_format != weight.activations
    ]
    if unreached:
        warnings.warn(
            f"calibration: no data reached {', '.join(unreached)}: no static scale is known there, so scales "
            f"are dynamic, one per token; use data that reaches every layer, or leave those out with skip",
            stacklevel=3,
        )


def dequantize(model: nn.Module) -> nn.Module:
    """The inverse of `quantize`, in place: float layers with the decoded weights in the model's dtype.

    Args:
        model: a model with quantized modules, from `quantize` or from a checkpoint.

    Returns:
        The model. On any error it is left as it was.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is quantized, or it is a single quantized module, which nothing can replace.
    """
    _check_model(model)
    quantized = walk(model).quantized
    if not quantized:
        raise ValueError("model: expected quantized layers, got none")
    config = attached_config(model) or QuantConfig()
    floats: dict[nn.Module, nn.Module] = {}
    for target in quantized:
        if target.module is model:
            raise ValueError(
                f"model: expected a model with quantized layers in it, got a single {type(model).__name__}; "
                f"use its to_{'linear' if isinstance(model, OVPLinear) else 'experts'}()"
            )
        old = target.module
        assert isinstance(old, (OVPLinear, OVPExperts))
        floats[old] = old.to_linear() if isinstance(old, OVPLinear) else old.to_experts()
    _exchange(model, floats, lambda: _unmark(model), lambda: _mark(model, config))
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_arguments(model: object, config: object, calibration: object, tokenizer: object) -> None:
    _check_model(model)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: expected an olive.QuantConfig, got {type(config).__name__}")
    format = config.activation_format
    if calibration is None:
        if format is not None and format.is_static:
            raise ValueError(
                "calibration: expected data for static activation scales, got None; pass calibration=[...], "
                "or use QuantConfig(activation_group_size=-1) for dynamic scales, which need none"
            )
        if tokenizer is not None:
            raise ValueError("tokenizer: expected None without calibration, got one")
        return
    if format is None:
        raise ValueError(
            f"calibration: expected None, because method {config.method!r} needs no data for weights and "
            f"activations is None, got {type(calibration).__name__}"
        )
    check_batches(calibration)


def _check_inventory(model: nn.Module, config: QuantConfig, inventory: Inventory) -> None:
    """Everything that can be found out before the long work starts."""
    if inventory.quantized:
        raise ValueError(
            f"model: expected a model that is not quantized, got quantized "
            f"{inventory.quantized[0].name or 'model'}; call olive.dequantize(model) first"
        )
    for _, wrapped in framework_models(model):
        if getattr(wrapped, "is_quantized", False):
            method = getattr(wrapped, "quantization_method", "another method")
            raise ValueError(
                f"model: expected a model that is not quantized, got one quantized with {method}"
            )
    check_skip(model, config.skip)
    if not inventory.targets:
        reasons = sorted({skipped.reason for skipped in inventory.skipped})
        found = "; ".join(reasons) if reasons else "no parameters"
        raise ValueError(f"model: expected at least one layer that can be quantized, got none ({found})")
    for target in inventory.targets:
        if target.module is model:
            raise ValueError(
                f"model: expected a model with layers in it, got a single {type(model).__name__}, "
                f"which cannot be exchanged in place; wrap it in nn.Sequential"
            )
        for name, parameter in target.parameters().items():
            if parameter.is_meta:
                raise ValueError(
                    f"{name}: expected a weight with values, got one on the meta device; "
                    f"load the checkpoint first"
                )
            if parameter.dtype not in FLOATS:
                raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {parameter.dtype}")


def _exchange(
    model: nn.Module,
    replacements: dict[nn.Module, nn.Module],
    then: Callable[[], None],
    undo: Callable[[], None],
) -> None:
    """Put new modules in the places of the old ones, then call `then`; all or nothing."""
    put_back = exchange(model, replacements)
    try:
        then()
    except BaseException:  # Ctrl-C too
        put_back()
        undo()
        raise


def _mark(model: nn.Module, config: QuantConfig) -> None:
    attach_config(model, config)
    for framework, wrapped in framework_models(model):
        attach_config(wrapped, config)
        framework.mark(wrapped, config)


def _unmark(model: nn.Module) -> None:
    attach_config(model, None)
    for framework, wrapped in framework_models(model):
        attach_config(wrapped, None)
        framework.unmark(wrapped)
