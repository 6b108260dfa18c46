"""Norms, and how their weights scale their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Gain:
    """How a norm multiplies its channels: by its weight, or by one plus it.

    Args:
        offset: 0.0, or 1.0 as in Gemma.
    """

    offset: float

    def scaled(self, weight: Tensor, factor: float) -> Tensor:
        """The weight that scales the norm's output `factor` times as much."""
        return (weight + self.offset) * factor - self.offset


WEIGHT, ONE_PLUS_WEIGHT = Gain(0.0), Gain(1.0)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with nothing but a vector `weight`, and possibly a `bias` of its size."""
    for name, module in model.named_modules():
        held = {key: value for key, value in module._parameters.items() if value is not None}
        weight = held.get("weight")
        if weight is None or weight.dim() != 1 or not set(held) <= {"weight", "bias"} or module._modules:
            continue
        if "bias" not in held or held["bias"].shape == weight.shape:
            yield name, module


def gain_of(norm: nn.Module, call: Call, channels: Tensor) -> Gain | None:
    """Find out how a norm's weight scales its output, by computing with others; None = in no known way.

    The norm is not changed: the other weights are ones and twos (less the offset), so the comparison is exact
    in every dtype and does not depend on the norm's own weight.

    Args:
        norm: from `find_norms`.
        call: arguments of one of its calls.
        channels: int64 [C], those to double.
    """
    return next((gain for gain in (WEIGHT, ONE_PLUS_WEIGHT) if _doubles(norm, call, channels, gain)), None)


def _doubles(norm: nn.Module, call: Call, channels: Tensor, gain: Gain) -> bool:
    output = _with_scales(norm, call, gain, lambda ones: ones)
    expected = output.clone()
    expected[..., channels] *= 2
    doubled = _with_scales(norm, call, gain, lambda ones: ones.index_fill(0, channels, 2.0))
    limit = 4 * torch.finfo(output.dtype).eps * output.abs().amax()
    return bool(((doubled - expected).abs() <= limit).all()) and bool(output[..., channels].any())


def _with_scales(norm: nn.Module, call: Call, gain: Gain, scales: Callable[[Tensor], Tensor]) -> Tensor:
    """The norm's output if its channels and its bias had these scales."""
    held = {key: value for key, value in norm._parameters.items() if value is not None}
    values = {key: scales(torch.ones_like(value)) for key, value in held.items()}
    values["weight"] = values["weight"] - gain.offset
    output: Tensor = functional_call(norm, values, *call)
    return output
