"""Tensors that stay float32, whatever dtype their module is brought to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Convert = Callable[[Tensor], Tensor]


def keeping_float32(convert: Convert, tensors: Iterable[Tensor | None]) -> Convert:
    """What `nn.Module._apply` is given, but that moves these tensors without another dtype.

    Args:
        convert: from a tensor to what takes its place.
        tensors: buffers and parameters of a module; gradients of these stay what they are too. Those that
            are not float32, and all other tensors, are converted.
    """
    kept: list[Tensor] = []
    for one in tensors:
        if one is not None:
            kept += [one] if one.grad is None else [one, one.grad]

    def apply(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and any(tensor is one for one in kept):
            wanted = convert(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if wanted.dtype != tensor.dtype:
                return tensor.to(wanted.device)
        return convert(tensor)

    return apply
