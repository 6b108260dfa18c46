"""`olive.quantize` and `olive.dequantize`: exchange the modules of a model for quantized ones, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

from torch import nn

from olive._progress import ProgressBar
from olive.config import QuantConfig
from olive.frameworks import framework_models
from olive.nn import OVPExperts, OVPLinear
from olive.ops.schemas import FLOATS
from olive.ptq.batches import calls, check_batches, run_batches
from olive.ptq.calibration import InputCollector
from olive.ptq.moments import ColumnMoment
from olive.ptq.parameter import StoredWeight, quantize_into
from olive.ptq.rotation import rotate
from olive.sequential import Replacements, SequentialQuantizer, collector_for
from olive.walk import ROTATED_ONLINE, Inventory, attach_config, attached_config, check_skip, exchange, walk

_NO_BATCH = "calibration: expected at least one batch or text with a token, got none"
_WITHOUT_DATA = (
    "QuantConfig(activation_group_size=-1) for dynamic scales",
    "QuantConfig(method='search') and dynamic scales",
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
        calibration: data on which the model is run, in eval mode: an iterable of mappings (`model(**batch)`),
            tuples or lists (`model(*batch)`), tensors (`model(batch)`) or texts. Method "gptq" and static
            activation scales need it. In 4 bits method "search" weighs errors by what reaches each column.
            With dynamic activation scales it also fills the report.
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
        UserWarning: layers that the calibration data never reached, whose activation scales are dynamic, one
            per token; layers and experts that too little data reached for "gptq", which are searched.
    """
    config = QuantConfig() if config is None else config
    _check_arguments(model, config, calibration, tokenizer)
    inventory = walk(model, config)
    _check_inventory(model, config, inventory)
    undo = rotate(model, balance=config.rotate_online) if config.rotate else _nothing
    try:
        if config.rotate:
            inventory = walk(model, config)  # a head that was tied has a weight of its own now
        data = () if calibration is None else calibration
        if config.method == "gptq":
            replacements = _quantize_in_sequence(model, config, inventory, data, tokenizer, progress)
        else:
            known = None
            if calibration is not None:
                known = _calibrate(model, config, inventory, data, tokenizer, progress)
            replacements = _quantize_at_once(config, inventory, known, progress)
        if calibration is not None:
            _warn_of_unreached(replacements, inventory)  # before the exchange: a warning may be an error
        _exchange(model, replacements, lambda: _mark(model, config), lambda: _unmark(model))
    except BaseException:  # Ctrl-C too
        undo()
        raise
    return model


def _nothing() -> None:
    pass


def _quantize_at_once(
    config: QuantConfig, inventory: Inventory, collector: InputCollector | None, progress: bool | None
) -> Replacements:
    """Every weight on its own, with what is known of its input."""
    samples, moments = ({}, {}) if collector is None else (collector.samples(), collector.moments())
    replacements: Replacements = {}
    with ProgressBar("quantizing", inventory.quantizable_values, progress) as bar:
        for target in inventory.targets:
            new = target.replacement(config)
            parameters = target.parameters()
            for name, weight in target.weights(new).items():
                quantize_into(
                    weight,
                    parameters[name],
                    config,
                    name=name,
                    samples=samples,
                    moments=moments,
                    advance=bar.advance,
                )
            replacements[target.module] = new
    return replacements


def _quantize_in_sequence(
    model: nn.Module,
    config: QuantConfig,
    inventory: Inventory,
    calibration: Iterable[Any],
    tokenizer: Any,
    progress: bool | None,
) -> Replacements:
    """Layer by layer, with errors made up for."""
    data = list(calls(model, calibration, tokenizer))
    if not data:
        raise ValueError(_NO_BATCH)
    searched: list[str] = []
    with ProgressBar("quantizing", inventory.quantizable_values, progress) as bar:
        sizes = {
            name: one.numel() for target in inventory.targets for name, one in target.parameters().items()
        }

        def done(name: str, stored: StoredWeight) -> None:
            searched.extend(name + part for part in stored.searched)
            loss = max(stored.losses.values(), default=None)
            bar.note(name if loss is None else f"{name}, loss {loss:.2%}")
            bar.advance(sizes[name])

        replacements = SequentialQuantizer(model, inventory.targets, config, data, done).run()
    if searched:
        warnings.warn(
            f"calibration: too little data reached {', '.join(searched)} to make up for errors there (fewer "
            f"rows than a quarter of the columns): searched instead; use more data, or data that reaches "
            f"every layer",
            stacklevel=3,
        )
    return replacements


def _calibrate(
    model: nn.Module,
    config: QuantConfig,
    inventory: Inventory,
    calibration: Iterable[Any],
    tokenizer: Any,
    progress: bool | None,
) -> InputCollector:
    """Run the float model and gather what its targets' inputs are like, by the name of each weight."""
    weighs = config.method == "search" and config.bits == 4
    collector = collector_for(
        list(inventory.targets),
        config,
        sample=config.activations is not None,
        moment=ColumnMoment() if weighs else None,
    )
    total = len(calibration) if isinstance(calibration, Sized) else 0
    done = 0
    with ProgressBar("calibrating", total, progress) as bar, collector.collecting():
        for done in run_batches(model, calibration, tokenizer):  # noqa: B007 (used below)
            collector.end_batch()
            bar.advance(1)
    if not done:
        raise ValueError(_NO_BATCH)
    return collector


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
    if calibration is None:
        if config.needs_calibration:
            raise ValueError(
                f"calibration: expected data for {config.needs_calibration}, got None; pass "
                f"calibration=[...], or use {_WITHOUT_DATA[config.method == 'gptq']}, which need none"
            )
        if tokenizer is not None:
            raise ValueError("tokenizer: expected None without calibration, got one")
        return
    if config.activations is None and (config.method == "paper" or config.bits == 8):
        raise ValueError(
            f"calibration: expected None, because method {config.method!r} with {config.bits} bits needs no "
            f"data for weights and activations is None, got {type(calibration).__name__}"
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
    rotations = [target.input_rotations(config) for target in inventory.targets]
    if config.rotate_online and not any(rotations):
        raise ValueError(
            f"rotate_online: expected False for a model without a {ROTATED_ONLINE} to quantize, got True"
        )


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
