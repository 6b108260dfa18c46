"""Libraries that want to know when their models are quantized; they register when they are imported.

This keeps `olive.quantize` free of them: it works on plain PyTorch models where none is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from olive.config import QuantConfig


@dataclass(frozen=True)
class Framework:
    """What one library wants done.

    Args:
        name: e.g. "transformers".
        models: the library's outermost models in a module, itself included.
        mark: called after the modules of such a model were exchanged for quantized ones.
        unmark: the inverse.
        tokenizer: loads the tokenizer that belongs to such a model, from where the model came from; OSError
            or ValueError where there is none. None = the library has no such thing.
        mark_prepared: called before quantization-aware training, when such a model's layers were
            exchanged for ones that quantize. None = it need not know.
        mark_converted: called after quantization-aware training, when such a model's layers were
            exchanged for ones that hold integers. None = it need not know.
    """

    name: str
    models: Callable[[nn.Module], list[nn.Module]]
    mark: Callable[[nn.Module, QuantConfig], None]
    unmark: Callable[[nn.Module], None]
    tokenizer: Callable[[nn.Module], Any] | None = None
    mark_prepared: Callable[[nn.Module], None] | None = None
    mark_converted: Callable[[nn.Module], None] | None = None


_REGISTERED: dict[str, Framework] = {}


def register_framework(framework: Framework) -> None:
    """Make a library known; a second registration under one name replaces the first."""
    _REGISTERED[framework.name] = framework


def framework_models(model: nn.Module) -> list[tuple[Framework, nn.Module]]:
    """Every registered library's outermost models in `model`."""
    return [(framework, found) for framework in _REGISTERED.values() for found in framework.models(model)]
