"""Formats by the packages that they come from, where these are installed: none of them is needed.

bitsandbytes (NF4), hqq (HQQ) and gptqmodel (GPTQ) run on a CPU. Each function returns what the package makes
of a weight, decoded, and counts the bits that it stores. Scales are stored in 16 bits where the package would
store them in the model's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Decoded
from bench.common import package_version

DataFree = Callable[[Tensor, int], Decoded]
WithMoments = Callable[[Tensor, Tensor], Decoded]
GPTQ_GROUP = 128


def installed(package: str) -> str:
    """Name and version of a package that can be imported; "" otherwise."""
    return f"{package} {package_version(package)}" if find_spec(package) is not None else ""


def bitsandbytes_nf4(weight: Tensor, group_size: int, *, double_quantization: bool = False) -> Decoded:
    """NF4 by bitsandbytes: blocks of `group_size` values, which run over the ends of rows."""
    functional: Any = import_module("bitsandbytes.functional")

    codes, state = functional.quantize_4bit(
        weight.float().contiguous(),
        blocksize=group_size,
        quant_type="nf4",
        compress_statistics=double_quantization,
    )
    decoded = functional.dequantize_4bit(codes, state).float()
    blocks = state.absmax.numel()
    overhead = 32.0 * blocks
    if double_quantization:  # 8 bits each; the outer maxima in float32, and their mean
        overhead = 8.0 * blocks + 32 * state.state2.absmax.numel() + 32
    return Decoded(decoded.reshape(weight.shape), 4 + overhead / weight.numel())


def bitsandbytes_nf4_double(weight: Tensor, group_size: int) -> Decoded:
    """The same with double quantization, as QLoRA uses it."""
    return bitsandbytes_nf4(weight, group_size, double_quantization=True)


def hqq_package(weight: Tensor, group_size: int) -> Decoded:
    """HQQ by hqq, along rows, with its settings for four bits."""
    package: Any = import_module("hqq.core.quantize")
    options = package.BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)["weight_quant_params"]
    codes, meta = package.Quantizer.quantize(
        weight.float().contiguous(), **options, bitpack=False, device="cpu"
    )
    scale, zero = (meta[key].half().float() for key in ("scale", "zero"))
    decoded = ((codes.reshape(-1, group_size).float() - zero) * scale).reshape(weight.shape)
    return Decoded(decoded, 4 + (16 + 16) * scale.numel() / weight.numel())


def gptqmodel_int4(
    weight: Tensor, second_moment: Tensor, *, activation_order: bool = False, searched: bool = False
) -> Decoded:
    """GPTQ, asymmetric, groups of 128, by gptqmodel.

    Its default ("group-aware order") moves whole groups, and columns within a group; with activation order
    grids are found at the start ("static groups"). Either way nothing is stored beside scales and zero
    points.

    Args:
        weight: float32 [N, K].
        second_moment: float32 [K, K], the sum of x x^T over the layer's inputs.
        activation_order: columns with the largest inputs first, in place of its default.
        searched: grids within minimum and maximum are tried for the least error, to the power of 2.4 as the
            method's authors do; by default it takes minimum and maximum.
    """
    package: Any = import_module("gptqmodel.quantization")
    gptq: Any = import_module("gptqmodel.quantization.gptq")

    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight.data.copy_(weight)
    config = package.QuantizeConfig(
        bits=4,
        group_size=GPTQ_GROUP,
        sym=False,
        desc_act=activation_order,
        static_groups=activation_order,
        act_group_aware=not activation_order,
        mse=2.4 if searched else 0.0,
        offload_to_disk=False,
    )
    solver = gptq.GPTQ(layer, config)
    solver.quantizer.configure(perchannel=True)
    # It takes inputs, not their moments: these rows have the moments that are wanted.
    values, vectors = torch.linalg.eigh(second_moment.double())
    inputs = (vectors * values.clamp(min=0).sqrt()).T.float()[None]
    with torch.no_grad():
        solver.add_batch(inputs, layer(inputs))
        decoded = solver.quantize()[0].float()
    overhead = rows * math.ceil(columns / GPTQ_GROUP) * (16 + 4)
    return Decoded(decoded, 4 + overhead / weight.numel())


def data_free_peers() -> list[tuple[str, str, int, DataFree]]:
    """Format, package with version, group size, function: of what is installed."""
    peers: list[tuple[str, str, int, DataFree]] = []
    if name := installed("bitsandbytes"):
        for size in (128, 64):
            peers.append(("NF4, absmax", name, size, bitsandbytes_nf4))
            peers.append(("NF4, double quantization", name, size, bitsandbytes_nf4_double))
    if name := installed("hqq"):
        peers += [("HQQ", name, size, hqq_package) for size in (128, 64)]
    return peers


def gptq_peers() -> list[tuple[str, str, WithMoments]]:
    """What data do, package with version, function: of what is installed."""
    if name := installed("gptqmodel"):
        return [
            ("GPTQ", name, gptqmodel_int4),
            ("GPTQ, searched grids", name, partial(gptqmodel_int4, searched=True)),
            ("GPTQ, activation order", name, partial(gptqmodel_int4, activation_order=True)),
        ]
    return []
