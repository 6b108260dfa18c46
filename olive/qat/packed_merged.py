"""`PackedMergedWeight`: QKR's matrices after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from olive.nn import UniformLinear
from olive.nn.keep_float32 import keeping_float32


class PackedMergedWeight(nn.Module):
    """QKR's matrices of all heads as one layer of integers, with what the queries' bias adds to logits.

    Args:
        packed: [H C, C]; it quantizes the hidden states itself.
        key_bias: u, float32 [H, C], or None.
    """

    bias_of_keys: Tensor | None

    def __init__(self, packed: UniformLinear, key_bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.columns = packed, packed.in_features
        self.register_buffer("bias_of_keys", key_bias)

    def keys(self, hidden: Tensor, input: Tensor) -> Tensor:
        """Keys [B, T, H C] of hidden states [B, T, C]; `input`, these as quantized, is not looked at."""
        keys: Tensor = self.packed(hidden)
        return keys

    def key_bias(self) -> Tensor | None:
        """u, float32 [H, C]."""
        return self.bias_of_keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # It is added to logits in full precision.
        super()._apply(keeping_float32(fn, [self.bias_of_keys]), recurse)  # type: ignore[no-untyped-call]
        return self
