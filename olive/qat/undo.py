"""What a change of a model takes back if it fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeps_requires_grad(model: nn.Module) -> Iterator[None]:
    """On an error, Ctrl-C too, parameters require gradients as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, required in before:
            parameter.requires_grad_(required)
        raise
