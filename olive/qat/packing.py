"""From a trained weight and the quantizer of its input to `UniformLinear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olive.nn import UniformLinear
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.layers import QATEmbedding, QATLayer
from olive.qat.weight_quantizers import WeightQuantizer


def pack_linear(layer: QATLayer, quantizer: ActivationQuantizer | None = None) -> UniformLinear:
    """The weight of a trained layer as integers; of a convolution the kernel as a matrix.

    Args:
        layer: not changed.
        quantizer: of its input; None = its own, if it has one.
    """
    quantizer = quantizer or layer.input_quantizer
    bias = None if isinstance(layer, QATEmbedding) else layer._parameters.get("bias")
    packed = pack_weight(layer.latent(), layer.weight_quantizer, bias, quantizer, layer.weight.dtype)
    return packed.train(layer.training)


def pack_weight(
    weight: Tensor,
    weight_quantizer: WeightQuantizer,
    bias: Tensor | None,
    quantizer: ActivationQuantizer | None,
    dtype: torch.dtype,
) -> UniformLinear:
    """A weight as integers.

    Args:
        weight: latent, float [N, ...].
        weight_quantizer: its quantizer.
        bias: float [N], or None. What the offset after the input's quantizer adds to every output is
            added to it.
        quantizer: of the input, or None.
        dtype: of the model.
    """
    codes, step, mid_rise, group_size = weight_quantizer.integers(weight)
    return UniformLinear.from_codes(
        codes,
        step,
        folded_bias(
            weight_quantizer(weight), bias, None if quantizer is None else quantizer.offset_after, dtype
        ),
        bits=weight_quantizer.bits,
        mid_rise=mid_rise,
        group_size=group_size,
        input_scale=_copied(None if quantizer is None else quantizer.scale),
        input_offset=_copied(None if quantizer is None else quantizer.offset),
        input_bits=None if quantizer is None else quantizer.bits,
        input_signed=quantizer is None or quantizer.is_signed,
        dtype=dtype,
    )


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32, copy=True)


@torch.no_grad()
def folded_bias(
    weight: Tensor, bias: Tensor | None, offset: Tensor | None, dtype: torch.dtype
) -> nn.Parameter | None:
    """The bias with what an offset of a layer's input adds to every output.

    Args:
        weight: on its levels, [N, K].
        bias: float [N], or None.
        offset: float [K], or None.
        dtype: of the result where there is no bias.
    """
    if offset is None:
        return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
    added = weight.float() @ offset.float()
    if bias is None:
        return nn.Parameter(added.to(dtype), requires_grad=False)
    return nn.Parameter((bias.float() + added).to(bias.dtype), requires_grad=bias.requires_grad)
