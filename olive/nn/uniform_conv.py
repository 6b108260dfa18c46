"""`UniformConv2d`: `nn.Conv2d` with a kernel of integer codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from olive.nn.uniform_linear import UniformLinear


class UniformConv2d(nn.Module):
    """A convolution as a product of patches with a weight on a uniform grid; no groups, no dilation.

    State-dict keys: `packed.codes`, `packed.scale`, `packed.bias`; with quantized inputs
    `packed.input_scale`.

    Args:
        packed: the kernel [N, C kh kw], with the bias; its input is quantized by one scale, without offset.
        kernel_size, stride, padding: as for `nn.Conv2d`, of two numbers each.

    Raises:
        ValueError: a padding with zeros that the input's levels do not hold (1 bit with sign).
    """

    def __init__(
        self,
        packed: UniformLinear,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> None:
        super().__init__()
        if any(padding) and packed.input_bits == 1 and packed.input_signed:
            raise ValueError("padding: expected 0 with an input of 1 bit, whose levels have no zero")
        self.packed = packed
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    @property
    def weight(self) -> Tensor:
        """The decoded kernel as a matrix [N, C kh kw]; decoded anew each time its values are used."""
        return self.packed.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """[N], or None."""
        return self.packed.bias

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W'], or both without B, in the input's dtype."""
        sizes = [
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(
                input.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        ]
        how: dict[str, Any] = {"padding": self.padding, "stride": self.stride}
        patches = functional.unfold(input, self.kernel_size, **how).transpose(-1, -2)  # [B, H' W', C kh kw]
        output: Tensor = self.packed(patches)
        shape = (*input.shape[:-3], self.packed.out_features, *sizes)
        return output.transpose(-1, -2).reshape(shape)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
