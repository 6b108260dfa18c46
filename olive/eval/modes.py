"""The state a model is measured in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the training flag that it had."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def check_reference(model: object, reference: object) -> None:
    """Refuse what cannot be compared with a model.

    Raises:
        TypeError: one of them is no module.
        ValueError: they are one.
    """
    for name, one in (("model", model), ("reference", reference)):
        if not isinstance(one, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(one).__name__}")
    if model is reference:
        raise ValueError(
            "reference: expected the model's original, got the model itself; olive.quantize works in place: "
            "load the original once more, or copy.deepcopy it before"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
