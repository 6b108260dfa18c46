"""StatsQ: weights as odd multiples of half a step, which is taken from their mean magnitude.

With b bits, n = 2^(b - 1), and s twice the mean magnitude of an output channel (or of a group of its values),

    k = clamp(floor(w n / s), -n, n - 1),    w_q = s (k + 1/2) / n.

Levels lie in the middle between thresholds ("mid-rise"): there is no zero, and every level is an odd integer
times s / (2 n), so products of codes are exact. The scale follows from the weights alone, at each call; no
gradient goes through it. Magnitudes are summed in float64, so that the order of the sum practically never
shows in the scale. Schema, checks, and the definition in plain PyTorch, which serves every device.

Source: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", arXiv:2302.02210. It
clips w / s to 1 - 1e-6 and rounds to even, which gives bfloat16 and 1 bit levels that do not exist; elsewhere
the floor above gives the same codes, but for values exactly on a threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olive.ops.schemas import check_float, library
from olive.ops.thresholds import code_of, threshold_distance

PER_CHANNEL = -1
MAX_BITS = 8

library.define("statsq(Tensor weight, int bits, int group_size) -> Tensor")
library.define("statsq_codes(Tensor weight, int bits, int group_size) -> (Tensor codes, Tensor scale)")
library.define("statsq_margin(Tensor weight, int bits, int group_size) -> Tensor")


def check_statsq(weight: Tensor, bits: int, group_size: int) -> tuple[int, int, int]:
    """Check the arguments, not their values, and return (N, K, groups of a row)."""
    check_float("weight", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected shape [N, ...], not empty, got {tuple(weight.shape)}")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits: expected 1 to {MAX_BITS}, got {bits}")
    if group_size != PER_CHANNEL and group_size < 1:
        raise ValueError(f"group_size: expected {PER_CHANNEL} per channel, or columns, got {group_size}")
    rows = int(weight.shape[0])
    columns = weight.numel() // rows
    return rows, columns, 1 if group_size == PER_CHANNEL else -(-columns // group_size)


@torch.library.register_fake("olive::statsq", lib=library)
def _(weight, bits, group_size):  # type: ignore[no-untyped-def]
    check_statsq(weight, bits, group_size)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("olive::statsq_codes", lib=library)
def _(weight, bits, group_size):  # type: ignore[no-untyped-def]
    rows, _, groups = check_statsq(weight, bits, group_size)
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    return codes, weight.new_empty((rows, groups), dtype=torch.float32)


@torch.library.register_fake("olive::statsq_margin", lib=library)
def _(weight, bits, group_size):  # type: ignore[no-untyped-def]
    check_statsq(weight, bits, group_size)
    return weight.new_empty(weight.shape, dtype=torch.float32)


def _steps(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """w n / s, float32 [N, K], and s, float32 [N, G]; zero where s is."""
    rows, columns, groups = check_statsq(weight, bits, group_size)
    width = columns if groups == 1 else group_size
    values = weight.reshape(rows, columns).float().contiguous()
    padded = torch.nn.functional.pad(values, (0, groups * width - columns)).view(rows, groups, width)
    counts = torch.full((groups,), width, dtype=torch.float32, device=weight.device)
    counts[-1] = columns - (groups - 1) * width
    scale = 2 * padded.abs().sum(-1, dtype=torch.float64).float() / counts
    steps = padded * (1 << (bits - 1)) / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.view(rows, -1)[:, :columns], scale


def statsq_codes_reference(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales.

    Args:
        weight: float32, bfloat16 or float16 [N, ...]; K values in each of its N output channels. A NaN or
            an infinity makes its group's scale, and so its levels, one too; NaN steps have code 0.
        bits: 1 to 8.
        group_size: values of a channel that share a scale, the last ones may be fewer; -1: all.

    Returns:
        k, int8 of the weight's shape, -2^(bits - 1) .. 2^(bits - 1) - 1; s, float32 [N, G]. A group of zeros
        has s = 0 and k = 0, and stands for zeros.

    Raises:
        TypeError, ValueError: another type or shape, or a number out of its range.
    """
    steps, scale = _steps(weight, bits, group_size)
    half = 1 << (bits - 1)
    return code_of(steps, -half, half - 1).to(torch.int8).reshape(weight.shape), scale


def statsq_margin_reference(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """How far each value is from the nearest threshold, in steps s / n.

    Thresholds are the whole numbers of steps between -n + 1 and n - 1: for 1 bit 0 alone. Values within a
    small margin are those that oscillate; the others can be frozen (confidence-guided annealing).

    Args and errors: as for `statsq_codes_reference`.

    Returns:
        float32 of the weight's shape, at least 0; of a group of zeros 0.

    Source: arXiv:2302.02210, the boundary range of its section on confidence-guided annealing.
    """
    steps, _ = _steps(weight, bits, group_size)
    half = 1 << (bits - 1)
    return threshold_distance(steps, -half, half - 1).reshape(weight.shape)


def statsq_reference(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """s (k + 1/2) / 2^(bits - 1): the weight on its levels, in its own shape and dtype.

    Gradient: that of the result, as it is, to every weight, clipped ones too ("straight through").

    Args and errors: as for `statsq_codes_reference`.
    """
    rows, columns, groups = check_statsq(weight, bits, group_size)
    codes, scale = statsq_codes_reference(weight, bits, group_size)
    width = columns if groups == 1 else group_size
    per_value = scale.repeat_interleave(width, dim=1)[:, :columns]
    levels = (codes.view(rows, columns).float() + 0.5) / (1 << (bits - 1))
    return (levels * per_value).to(weight.dtype).view(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


library.impl("statsq", statsq_reference, "CompositeExplicitAutograd")
library.impl("statsq_codes", statsq_codes_reference, "CompositeExplicitAutograd")
library.impl("statsq_margin", statsq_margin_reference, "CompositeExplicitAutograd")
torch.library.register_autograd("olive::statsq", _backward, setup_context=_setup_context, lib=library)
statsq = torch.ops.olive.statsq
statsq_codes = torch.ops.olive.statsq_codes
statsq_margin = torch.ops.olive.statsq_margin
