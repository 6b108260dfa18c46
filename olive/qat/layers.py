"""Layers that quantize their weight, and what they read, in the forward pass."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional

from olive.nn.origin import Origin, take_over
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.latent import ParameterLatent
from olive.qat.weight_quantizers import WeightQuantizer


class QATLayer(ParameterLatent):
    """What they share: the float layer's own parameters, a weight and an optional input quantizer.

    State-dict keys of the float layer stay; `weight_quantizer.*` and `input_quantizer.*` are added.
    """

    input_quantizer: ActivationQuantizer | None
    origin: Origin

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """A quantized layer in the place of `layer`, with its parameters, attributes and hooks."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.origin = Origin.of(layer, ())
        vars(new).update(new.origin.attributes)
        for name, parameter in layer._parameters.items():
            new.register_parameter(name, parameter)
        new.weight_quantizer = weight_quantizer
        new.input_quantizer = input_quantizer
        take_over(new, layer)
        return new

    def to_float(self) -> nn.Module:
        """The float layer with the latent weight; parameters are shared."""
        new = self.origin.rebuild({})
        for name, parameter in self._parameters.items():
            new.register_parameter(name, parameter)
        take_over(new, self)
        return new

    def quantized_weight(self) -> Tensor:
        """The weight on its levels, [N, ...], with the latent weight's gradient."""
        quantized: Tensor = self.weight_quantizer(self.channels_first(self.weight))
        return quantized

    def quantized_input(self, input: Tensor) -> Tensor:
        """What the layer multiplies."""
        return input if self.input_quantizer is None else self.input_quantizer(input)


class QATLinear(QATLayer, nn.Linear):  # type: ignore[misc]  # of `weight`, by both bases
    """`nn.Linear`, quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return functional.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QATConv1D(QATLayer):
    """transformers' `Conv1D`, whose weight is [K, N]; quantized by output channels as every linear layer."""

    nf: int
    bias: nn.Parameter
    channel_dim = 1

    def channels_first(self, tensor: Tensor) -> Tensor:
        return tensor.t()

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return functional.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QATConv2d(QATLayer, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d`, quantized: one grid for each output channel."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W']."""
        output: Tensor = self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)
        return output


class QATEmbedding(QATLayer, nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding`, quantized with a grid for each row: only rows that are looked up are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """int [...] -> [..., K]."""
        rows = nn.Embedding.forward(self, input)
        quantized: Tensor = self.weight_quantizer(rows.flatten(0, -2))
        return quantized.view(rows.shape)
