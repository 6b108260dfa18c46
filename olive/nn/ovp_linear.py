"""`OVPLinear`, `OVPConv1D`: `nn.Linear` and transformers' `Conv1D` with a weight in outlier-victim pairs."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from olive.formats import ActivationFormat
from olive.nn.lazy_weight import LazyWeight
from olive.nn.origin import Origin, empty, take_over
from olive.nn.ovp_weight import OVPWeight


class OVPLinear(OVPWeight):
    """y = x W^T + bias with a quantized weight; the output has the input's dtype.

    State-dict keys: `codes`, `scale`, and for 4 bits `codebook`, in place of `weight`, and `bias`; with
    static activations also `activation_scale`, and for "ovp4" `activation_codebook`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        bits: per code, 4 or 8.
        activations: how the input is quantized; None = it is not.
        device: of the empty parameters.
        dtype: of the bias, and of `weight`.
    """

    bias: nn.Parameter | None
    origin: Origin | None = None  # the replaced module, where there was one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        bits: int = 4,
        activations: ActivationFormat | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features,
            in_features,
            group_size,
            bits=bits,
            activations=activations,
            transposed=transposed,
            device=device,
            dtype=dtype,
        )
        self.register_parameter("bias", empty((out_features,), self.dtype, device) if bias else None)
        if self.bias is not None:
            self.bias.requires_grad_(True)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group_size: int,
        *,
        bits: int = 4,
        activations: ActivationFormat | None = None,
    ) -> Self:
        """An empty quantized layer in the place of `linear`, on its device; fill it with `set_`.

        Bias, hooks and training flag are the layer's own; `linear` is not changed.

        Args:
            linear: nn.Linear, or a module with its `weight` [N, K] and `bias`.
            group_size, bits, activations: as above.
        """
        weight = linear.weight
        assert isinstance(weight, Tensor)
        rows, columns = cls._size(weight)
        new = cls(
            columns,
            rows,
            bias=False,
            group_size=group_size,
            bits=bits,
            activations=activations,
            device=weight.device,
            dtype=weight.dtype,
        )
        new.register_parameter("bias", linear._parameters.get("bias"))
        new.origin = Origin.of(linear, ("weight",))
        take_over(new, linear)
        return new

    @staticmethod
    def _size(weight: Tensor) -> tuple[int, int]:
        """(N, K) of the float parameter."""
        return int(weight.shape[0]), int(weight.shape[1])

    def to_linear(self) -> nn.Module:
        """The float layer with the decoded weight, of the class that was replaced (nn.Linear if none was)."""
        origin = self.origin
        if origin is None:
            size = {"in_features": self.in_features, "out_features": self.out_features}
            origin = Origin(nn.Linear, dict(size), frozenset({"weight"}))
        new = origin.rebuild({"weight": self.to_float()})
        new.register_parameter("bias", self.bias)
        take_over(new, self)
        return new

    def weights(self) -> dict[str, OVPWeight]:
        """The quantized weights by the name of the float parameter each stands for; here only itself."""
        return {"weight": self}

    @property
    def weight(self) -> Tensor:
        """The decoded weight in the float parameter's layout; decoded anew each time its values are used."""
        if torch.compiler.is_compiling():
            return self.to_float()  # the compiler drops it where only its dtype is looked at
        size = (self.out_features, self.in_features)
        size = size[::-1] if self.transposed else size
        return LazyWeight(size, self.dtype, self.codes.device, self.to_float)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply.

        Args:
            input: float32, bfloat16 or float16 [..., K].

        Returns:
            input's dtype, [..., N].
        """
        return self.linear(input, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class OVPConv1D(OVPLinear):
    """The same in the place of transformers' `Conv1D`, whose float weight is [K, N]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        bits: int = 4,
        activations: ActivationFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            group_size=group_size,
            bits=bits,
            activations=activations,
            transposed=True,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def _size(weight: Tensor) -> tuple[int, int]:
        return int(weight.shape[1]), int(weight.shape[0])

    @property
    def nf(self) -> int:
        """N, as `Conv1D` calls it."""
        return self.out_features

    @property
    def nx(self) -> int:
        """K, as `Conv1D` calls it."""
        return self.in_features
