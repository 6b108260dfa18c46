"""`UniformEmbedding`: `nn.Embedding` with a table of integer codes."""

from __future__ import annotations

from torch import Tensor, nn

from olive import ops
from olive.formats.layout import PER_CHANNEL
from olive.nn.uniform_linear import UniformLinear


class UniformEmbedding(nn.Module):
    """Rows of a weight on a uniform grid, decoded as they are looked up.

    State-dict keys: `packed.codes`, `packed.scale`.

    Args:
        packed: the table [N, K], one scale per row, no bias; its input is not quantized.
    """

    def __init__(self, packed: UniformLinear) -> None:
        super().__init__()
        self.packed = packed

    @property
    def num_embeddings(self) -> int:
        """N, rows."""
        return self.packed.out_features

    @property
    def embedding_dim(self) -> int:
        """K, columns."""
        return self.packed.in_features

    @property
    def weight(self) -> Tensor:
        """The decoded table; decoded anew each time its values are used."""
        return self.packed.weight

    def forward(self, input: Tensor) -> Tensor:
        """Look up.

        Args:
            input: int [...].

        Returns:
            the model's dtype, [..., K].
        """
        packed, rows = self.packed, input.flatten()
        size = (packed.in_features, packed.bits, packed.mid_rise, PER_CHANNEL)
        shape = (*input.shape, packed.in_features)
        if input.numel() == 0:
            return packed.scale.new_empty(shape, dtype=packed.dtype)
        values: Tensor = ops.uniform_decode(packed.codes[rows], packed.scale[rows], *size, packed.dtype)
        return values.view(shape)
