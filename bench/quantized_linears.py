"""Candidates with quantized activations for `bench_ovp_linear`: ours, torchao's, and the check of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import copies_for
from olive import ops
from olive.formats import get_codebook

Call = Callable[[int], Tensor]


class Activation(NamedTuple):
    """How an activation is quantized, as `ovp_linear_quantized` takes it."""

    format: str
    group_size: int
    codebook: Tensor | None


ACTIVATIONS = {
    "olive_w4a8": Activation("int8", -1, None),
    "olive_w4a8_groups": Activation("int8", 128, None),
    "olive_w4a4": Activation("ovp4", -1, get_codebook("int4").tensor()),
}


def quantized_call(
    x: Tensor, packed: list[tuple[Tensor, Tensor]], book: Tensor, n: int, group_size: int, how: Activation
) -> Call:
    """`ovp_linear_quantized`, the quantizing of x included, over copies of one packed weight."""

    def call(turn: int) -> Tensor:
        out: Tensor = ops.ovp_linear_quantized(
            x, *packed[turn % len(packed)], book, None, n, group_size,
            how.format, how.group_size, "optimal", how.codebook, None,
        )  # fmt: skip
        return out

    return call


def quantized_input(x: Tensor, how: Activation) -> Tensor:
    """What x is after quantizing: levels times scales, float32."""
    levels, scale = ops.quantize_activations(
        x, how.format, how.group_size, "optimal", how.codebook, None, torch.float32
    )
    width = x.shape[-1] if how.group_size <= 0 else how.group_size
    values: Tensor = levels * scale.repeat_interleave(width, dim=-1)[:, : x.shape[-1]]
    return values


def da8w4_call(x: Tensor, n: int, k: int, group_size: int, cold_bytes: int) -> Call | None:
    """torchao's W4A8 operator with its per-token quantization; None where its CPU kernel is missing."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        return None
    if "CPU" not in torch._C._dispatch_dump("torchao::da8w4_linear_cpu"):
        return None
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = torch.rand(n, k // group_size) * 0.01 + 0.001
    zeros = torch.full((n, k // group_size), 8, dtype=torch.int8)
    prepacked = torch.ops.torchao.da8w4_linear_prepack_cpu(codes, scales, zeros)
    copies = [
        tuple(part.clone() for part in prepacked)
        for _ in range(copies_for(prepacked[0].numel() * prepacked[0].element_size(), cold_bytes))
    ]

    def call(turn: int) -> Tensor:
        weight, weight_scale, weight_zero, compensation = copies[turn % len(copies)]
        scale = x.float().abs().amax(dim=1) / 127.0
        quantized = torch.clamp(torch.round(x.float() / scale[:, None]), -128, 127).to(torch.int8)
        out: Tensor = torch.ops.torchao.da8w4_linear_cpu(
            quantized, scale, torch.zeros_like(scale, dtype=torch.int32), weight, weight_scale, weight_zero,
            compensation, None, x.dtype,
        )  # fmt: skip
        return out

    return call
