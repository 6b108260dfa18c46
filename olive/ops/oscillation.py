"""Oscillations of weights in training: how often each one's code goes back where it came from.

With u = weight / step and p = u + offset, the code is k = clamp(floor(p), qmin, qmax): thresholds are whole
numbers of p. Offset 0 is StatsQ (mid-rise: thresholds at whole steps), 0.5 is LSQ (at half steps). Then

    change = k - codes,    oscillated = change != 0 and sign(change) = -direction,
    frequency = momentum * oscillated + (1 - momentum) * frequency,
    direction = sign(change) where the code changed.

Schema, checks, and the definition in plain PyTorch, which serves every device.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086, section 4.1;
the range around thresholds: Liu et al., arXiv:2302.02210, confidence-guided annealing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.ops.schemas import check_device, check_float, check_tensor, library
from olive.ops.thresholds import code_of, threshold_distance

library.define(
    "oscillation_(Tensor weight, Tensor step, float offset, int qmin, int qmax, float momentum, "
    "float boundary, Tensor(a!) codes, Tensor(b!) direction, Tensor(c!) frequency) -> Tensor"
)


def step_width(weight: Tensor, step: Tensor) -> int:
    """Columns that share a step: ceil(K / G), or all K of the tensor's rows where there is one step."""
    columns = weight.numel() // int(weight.shape[0])
    return -(-columns // int(step.shape[1]))


def check_oscillation(
    weight: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    momentum: float,
    codes: Tensor,
    direction: Tensor,
    frequency: Tensor,
) -> None:
    """Check the arguments, not their tensors' values."""
    check_float("weight", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected shape [N, ...], not empty, got {tuple(weight.shape)}")
    if step.dtype != torch.float32:
        raise TypeError(f"step: expected torch.float32, got {step.dtype}")
    rows = int(weight.shape[0])
    columns = weight.numel() // rows
    groups = int(step.shape[1]) if step.dim() == 2 else 0
    whole = tuple(step.shape) == (1, 1)
    if not whole and (groups < 1 or step.shape[0] != rows or -(-columns // -(-columns // groups)) != groups):
        raise ValueError(
            f"step: expected shape [{rows}, G] for G groups of equal width in {columns} columns, or (1, 1), "
            f"got {tuple(step.shape)}"
        )
    if not -128 <= qmin < qmax <= 127:
        raise ValueError(f"qmin, qmax: expected -128 <= qmin < qmax <= 127, got {qmin}, {qmax}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected 0 to 1, got {momentum}")
    check_tensor("codes", codes, torch.int8, tuple(weight.shape))
    check_tensor("direction", direction, torch.int8, tuple(weight.shape))
    check_tensor("frequency", frequency, torch.float32, tuple(weight.shape))
    check_device(weight=weight, step=step, codes=codes, direction=direction, frequency=frequency)


@torch.library.register_fake("olive::oscillation_", lib=library)
def _(weight, step, offset, qmin, qmax, momentum, boundary, codes, direction, frequency):  # type: ignore[no-untyped-def]
    check_oscillation(weight, step, qmin, qmax, momentum, codes, direction, frequency)
    return weight.new_empty(weight.shape, dtype=torch.bool)


def _positions(weight: Tensor, step: Tensor, offset: float) -> Tensor:
    """weight / step + offset, float32 [N, K]; a step of 0 counts as infinite."""
    values = weight.reshape(weight.shape[0], -1).float()
    columns = values.shape[1]
    per_value = step.repeat_interleave(step_width(weight, step), dim=1)[:, :columns]
    steps = torch.where((per_value == 0) & ~values.isnan(), 0.0, values / per_value)
    return steps + offset


def oscillation_reference_(
    weight: Tensor,
    step: Tensor,
    offset: float,
    qmin: int,
    qmax: int,
    momentum: float,
    boundary: float,
    codes: Tensor,
    direction: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Take note of a step of training, in place, and say which weights are near a threshold.

    Args:
        weight: float32, bfloat16 or float16 [N, ...]; K values in each of its N rows.
        step: float32 [N, G], the distance between two levels in groups of ceil(K / G) columns, of which the
            last may be shorter; [1, 1] for all. Where it is 0, weights count as 0 steps.
        offset: in steps: 0 for StatsQ, 0.5 for LSQ.
        qmin, qmax: the first and the last code, -128 to 127.
        momentum: of the moving average, 0 to 1.
        boundary: in steps.
        codes: int8 of the weight's shape, updated: k. A weight that is NaN has code 0, or the nearest to it
            in range.
        direction: int8 likewise, updated: -1 or 1, the sign of the last change of the code; 0 before it.
        frequency: float32 likewise, updated: moving average of the share of calls at which it oscillated.

    Returns:
        bool of the weight's shape: whether p is within `boundary` of its nearest threshold, a whole number
        from qmin + 1 to qmax; not where the weight is NaN.

    Raises:
        TypeError, ValueError: another type or shape, another device, or a number out of its range.
    """
    check_oscillation(weight, step, qmin, qmax, momentum, codes, direction, frequency)
    position = _positions(weight, step, offset).view(weight.shape)
    found = code_of(position, qmin, qmax).to(torch.int8)
    sign = (found.short() - codes.short()).sign()
    oscillated = (sign != 0) & (sign == -direction.short())
    frequency.copy_(oscillated.float() * momentum + frequency * (1 - momentum))
    direction.copy_(torch.where(sign != 0, sign, direction))
    codes.copy_(found)
    return threshold_distance(position, qmin, qmax) <= boundary


library.impl("oscillation_", oscillation_reference_, "CompositeExplicitAutograd")
oscillation_ = torch.ops.olive.oscillation_
