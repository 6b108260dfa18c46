"""`olive.quantize` and `olive.dequantize`: exchange the modules of a model for quantized ones, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olive import ops
from olive._progress import ProgressBar
from olive.config import QuantConfig
from olive.formats import LEARNED, PER_TENSOR
from olive.frameworks import framework_models
from olive.nn import OVPExperts, OVPLinear
from olive.ops.schemas import FLOATS
from olive.ptq import quantize_weight
from olive.walk import Inventory, attach_config, attached_config, check_skip, exchange, walk

# Decoded at a time when the error is measured: what fits a CPU's caches; a GPU is waited for each time.
_CHUNK_VALUES = {"cpu": 1 << 20}
_LARGE_CHUNK_VALUES = 1 << 26


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a stack, in the canonical layout, with the quality it has.

    Args:
        codes: uint8 [N, ceil(K / 2)] or [E, N, ceil(K / 2)].
        scale: int16 [N, G] or [E, N, G].
        codebook: int8 [32].
        sqnr_db: signal-to-quantization-noise ratio in dB, inf if the codes hold the weight exactly.
    """

    codes: Tensor
    scale: Tensor
    codebook: Tensor
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
    if weight.dim() == 2:
        codes, scale, table = quantize_weight(weight.contiguous(), config, name=name)
        signal, noise = _energies(weight, codes, scale, table, config.group_size)
    else:
        parts = []
        signal = noise = 0.0
        for index, one in enumerate(weight):
            part = quantize_weight(one.contiguous(), config, name=f"{name}[{index}]")
            energies = _energies(one, *part, config.group_size)
            signal, noise = signal + energies[0], noise + energies[1]
            parts.append(part)
            if advance is not None:
                advance(one.numel())
        codes, scale = (
            torch.stack([part.codes for part in parts]),
            torch.stack([part.scale for part in parts]),
        )
        table = parts[0].codebook
    if advance is not None and weight.dim() == 2:
        advance(weight.numel())
    return StoredWeight(codes, scale, table, _decibels(signal, noise))


def _quantize_as_one(
    weight: Tensor, config: QuantConfig, name: str, advance: Callable[[int], None] | None
) -> StoredWeight:
    """A stack [E, N, K] as one tall weight [E x N, K]: its experts share one fitted codebook."""
    experts, rows, columns = weight.shape
    tall = weight.reshape(experts * rows, columns).contiguous()
    codes, scale, table = quantize_weight(tall, config, name=name)
    signal, noise = _energies(tall, codes, scale, table, config.group_size)
    if config.group_size == PER_TENSOR:
        scale = scale.expand(experts, 1).contiguous()
    if advance is not None:
        advance(weight.numel())
    return StoredWeight(
        codes.view(experts, rows, -1),
        scale.view(experts, -1, scale.shape[-1]),
        table,
        _decibels(signal, noise),
    )


def _energies(
    weight: Tensor, codes: Tensor, scale: Tensor, table: Tensor, group_size: int
) -> tuple[float, float]:
    """Sums of w^2 and of (w - decoded w)^2."""
    rows, columns = weight.shape
    step = max(1, _CHUNK_VALUES.get(weight.device.type, _LARGE_CHUNK_VALUES) // columns)
    signal = noise = 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        part_scale = scale if group_size == PER_TENSOR else scale[start : start + step]
        decoded = ops.ovp_decode(
            codes[start : start + step], part_scale, table, columns, group_size, torch.float32
        )
        signal += _energy(part)
        noise += _energy(part - decoded)
    return signal, noise


def _energy(values: Tensor) -> float:
    """Sum of squares of [rows, columns]: rows in float32, 1e-6 off at most, added up in float64."""
    energy = float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
    if not 1e-20 < energy < 1e20:  # float32 squares of such values may have overflowed or vanished
        energy = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return energy


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def quantize(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    calibration: Any = None,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize the weights of a model to 4 bits, in place.

    Linear layers, transformers' `Conv1D` and the fused experts of mixture-of-experts models are exchanged for
    quantized modules; everything else stays (`olive.report` lists it with the reasons). No data is needed.

    Args:
        model: a PyTorch model, from transformers or not, with its weights in float32, bfloat16 or float16.
        config: how; None = `QuantConfig()`.
        calibration: None; no method of this version uses data.
        progress: show a bar on stderr if it takes longer than two seconds; None = only on a terminal.

    Returns:
        The model. On any error, and on Ctrl-C, it is left exactly as it was.

    Raises:
        TypeError: model or config of another type, or a weight of another dtype.
        ValueError: nothing to quantize, a model that is quantized already, a weight on the meta device, NaN
            or Inf in a weight, a name in `skip` that the model does not have.
    """
    config = QuantConfig() if config is None else config
    _check_arguments(model, config, calibration)
    inventory = walk(model, config)
    _check_inventory(model, config, inventory)
    replacements: dict[nn.Module, nn.Module] = {}
    with ProgressBar("quantizing", inventory.quantizable_values, progress) as bar:
        for target in inventory.targets:
            new = target.replacement(config.group_size)
            parameters = target.parameters()
            for name, weight in target.weights(new).items():
                stored = quantize_parameter(
                    parameters[name], config, transposed=weight.transposed, name=name, advance=bar.advance
                )
                weight.set_(stored.codes, stored.scale, stored.codebook)
                weight.sqnr_db = stored.sqnr_db
                weight.pack_()
            replacements[target.module] = new
    _exchange(model, replacements, lambda: _mark(model, config), lambda: _unmark(model))
    return model


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


def _check_arguments(model: object, config: object, calibration: object) -> None:
    _check_model(model)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: expected an olive.QuantConfig, got {type(config).__name__}")
    if calibration is not None:
        raise ValueError(
            f"calibration: expected None, because method {config.method!r} needs no data, "
            f"got {type(calibration).__name__}"
        )


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
