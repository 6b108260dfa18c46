"""`LazyWeight`: a tensor that stands for a decoded weight and decodes it only when its values are used.

Much model code reads `layer.weight.dtype` or `.device` at every call (T5 does so before each `wo`): that must
not decode a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METADATA: frozenset[Any] = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "layout",
        "requires_grad",
        "is_meta",
        "is_cuda",
        "is_cpu",
        "grad",
    )
) | frozenset(
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "__len__")
)


class LazyWeight(Tensor):
    """Shape, dtype and device of a weight; any operation on it works on the decoded weight.

    Args:
        size: of the decoded weight.
        dtype: likewise.
        device: likewise.
        decode: returns the decoded weight.
    """

    _decode: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, decode: Callable[[], Tensor]
    ) -> LazyWeight:
        tensor: LazyWeight = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        tensor._decode = decode
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            return func(*_decoded(args), **_decoded(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_decoded(args), **_decoded(kwargs or {}))


def _decoded(arguments: Any) -> Any:
    return tree_map(lambda value: value._decode() if isinstance(value, LazyWeight) else value, arguments)
