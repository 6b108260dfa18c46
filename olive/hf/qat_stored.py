"""Checks of a checkpoint with layers of integers, from its files' headers: before anything is loaded.

transformers fills what a checkpoint lacks with values of its own, and goes on; here that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from olive.hf.stored import AGAIN, FLOATS, Header, check_header
from olive.nn import UniformLinear

_EXACT = {torch.uint8: ("U8",), torch.bool: ("BOOL",)}


def check_stored(name: str, layer: nn.Module, headers: Mapping[str, Header]) -> None:
    """Check that the files hold every tensor of one layer, in the right types and shapes.

    Args:
        name: of the layer in the checkpoint.
        layer: the empty layer they are to be loaded into.
        headers: of all files.

    Raises:
        ValueError: a tensor is missing or has another shape.
        TypeError: a tensor of another type.
    """
    for prefix, module in layer.named_modules(prefix=name):
        for field, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full, dtypes = f"{prefix}.{field}", _dtypes(module, field, tensor)
                check_header(full, dtypes, tuple(tensor.shape), headers)


def _dtypes(module: nn.Module, field: str, tensor: Tensor) -> tuple[str, ...]:
    """How safetensors may call the type."""
    if isinstance(module, UniformLinear) and field in module._buffers and tensor.is_floating_point():
        return ("F32",)
    return _EXACT.get(tensor.dtype, FLOATS)


def check_listed(layers: Sequence[str], headers: Mapping[str, Header], where: str) -> None:
    """Refuse codes of a layer that the config does not list.

    Args:
        layers: names in the config.
        headers: of all files.
        where: the config's field, for errors.

    Raises:
        ValueError: there are such codes.
    """
    listed = set(layers)
    for name in headers:
        if name.endswith(".codes"):
            parts = name.split(".")
            if not any(".".join(parts[:end]) in listed for end in range(1, len(parts))):
                raise ValueError(f"{where}: expected the layer of {name}, got none in config.json; {AGAIN}")
