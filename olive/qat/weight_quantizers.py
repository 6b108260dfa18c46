"""Quantizers of weights: modules from a latent weight to the same weight on its levels.

Each stands on a grid, which says how far a weight is from changing its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from olive.nn.keep_float32 import keeping_float32
from olive.ops.lsq import LEAST_SCALE, integer_range, lsq, lsq_initial_scale
from olive.ops.statsq import PER_CHANNEL, statsq, statsq_codes, statsq_margin
from olive.ops.thresholds import code_of, from_threshold


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that several share (FSDP2), or the tensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class Grid(NamedTuple):
    """Levels of a weight: code = clamp(floor(weight / step + offset), qmin, qmax).

    Args:
        step: float32 [N, G], the distance of two levels; 0 where all weights of a group are. G groups are as
            wide as each other but for the last: ceil(K / G) columns.
        offset: 0 where levels lie in the middle between whole steps (mid-rise), 1/2 where they are whole
            steps (mid-tread).
        qmin, qmax: the smallest and the largest code.
    """

    step: Tensor
    offset: float
    qmin: int
    qmax: int

    def _step(self, values: Tensor) -> Tensor:
        """The step of each value, to divide by or multiply with: float32 [N, 1] or [N, K]."""
        groups, columns = int(self.step.shape[1]), int(values.shape[1])
        if groups == 1:
            return self.step
        return self.step.repeat_interleave(-(-columns // groups), dim=1)[:, :columns]

    def position(self, weight: Tensor) -> Tensor:
        """weight / step + offset, float32 [N, K]: thresholds are the whole numbers qmin + 1 to qmax.

        Args:
            weight: float [N, ...].
        """
        values = weight.flatten(1).float()
        step = self._step(values)
        return values / torch.where(step > 0, step, 1.0) + self.offset

    def code(self, weight: Tensor) -> Tensor:
        """The weight's codes, float32 [N, K]; NaN counts as a weight of code 0."""
        return code_of(self.position(weight), self.qmin, self.qmax)

    def level(self, code: Tensor) -> Tensor:
        """The value a code [N, K] stands for, float32."""
        return (code.float() + (0.5 - self.offset)) * self._step(code)

    def from_threshold(self, weight: Tensor) -> Tensor:
        """Signed distance to the nearest threshold, in steps, float32 [N, K]."""
        return from_threshold(self.position(weight), self.qmin, self.qmax)


class Integers(NamedTuple):
    """A weight as integers: value = step (code + 1/2) if mid_rise, else step code.

    Args:
        codes: int8 [N, K], -2^(bits - 1) .. 2^(bits - 1) - 1.
        step: float32 [N, G].
        mid_rise: as above.
        group_size: columns that share a step; -1 = all.
    """

    codes: Tensor
    step: Tensor
    mid_rise: bool
    group_size: int


class WeightQuantizer(nn.Module):
    """What the quantizers of weights share.

    Args:
        bits: 1 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def grid(self, weight: Tensor) -> Grid:
        """The grid on which this weight is quantized now; no gradient goes through it.

        Args:
            weight: float [N, ...].
        """
        raise NotImplementedError

    def integers(self, weight: Tensor) -> Integers:
        """What `forward` gives, as integers: the same levels, each code the same.

        Args:
            weight: float [N, ...].
        """
        raise NotImplementedError

    @torch.no_grad()
    def margin(self, weight: Tensor) -> Tensor:
        """How far each value is from its nearest threshold, in steps: float32 of the weight's shape.

        Args:
            weight: float [N, ...].
        """
        return self.grid(weight).from_threshold(weight).abs().view(weight.shape)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class StatsQ(WeightQuantizer):
    """Levels from the weights' own mean magnitude (`olive.ops.statsq`): nothing to learn, nothing to set up.

    Args:
        bits: 1 to 8.
        group_size: columns of an output channel that share a scale; -1 = all.
    """

    def __init__(self, bits: int, group_size: int = PER_CHANNEL) -> None:
        super().__init__(bits)
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its levels; its gradient reaches the weight as it is."""
        quantized: Tensor = statsq(weight, self.bits, self.group_size)
        return quantized

    @torch.no_grad()
    def grid(self, weight: Tensor) -> Grid:
        """The grid of a weight, of step s / 2^(bits - 1)."""
        half = 1 << (self.bits - 1)
        _, scale = statsq_codes(weight, self.bits, self.group_size)
        groups, columns = int(scale.shape[1]), weight[0].numel()
        if groups > 1 and -(-columns // groups) != self.group_size:  # a last group that is much shorter
            scale = scale.repeat_interleave(self.group_size, dim=1)[:, :columns]
        return Grid(scale / half, 0.0, -half, half - 1)

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Integers:
        codes, scale = statsq_codes(weight, self.bits, self.group_size)
        return Integers(codes.flatten(1), scale / (1 << (self.bits - 1)), True, self.group_size)

    @torch.no_grad()
    def margin(self, weight: Tensor) -> Tensor:
        margin: Tensor = statsq_margin(weight, self.bits, self.group_size)
        return margin

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


class ScaledWeight(WeightQuantizer):
    """Levels at integer multiples of a scale per output channel; of 1 bit plus and minus that scale."""

    def channel_scale(self, weight: Tensor) -> Tensor:
        """The scale, float32 [N]."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its levels; gradients as `olive.ops.lsq` says."""
        quantized: Tensor = lsq(weight, self.channel_scale(weight), self.bits, True, 0)
        return quantized

    @torch.no_grad()
    def grid(self, weight: Tensor) -> Grid:
        """The grid of a weight; 1 bit is mid-rise with twice the scale."""
        step = local(self.channel_scale(weight)).clamp(min=LEAST_SCALE)[:, None]
        if self.bits == 1:
            return Grid(2 * step, 0.0, -1, 0)
        return Grid(step, 0.5, *integer_range(self.bits, signed=True))

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Integers:
        step = self.channel_scale(weight).clamp(min=LEAST_SCALE)[:, None]
        levels = lsq(weight.flatten(1).float(), step[:, 0], self.bits, True, 0) / step
        if self.bits == 1:
            return Integers((levels.round() - 1).div(2).to(torch.int8), 2 * step, True, PER_CHANNEL)
        return Integers(levels.round().to(torch.int8), step, False, PER_CHANNEL)


class LSQWeight(ScaledWeight):
    """Levels at integer multiples of a scale per output channel, which is learned (`olive.ops.lsq`).

    Args:
        bits: 1 to 8.
        weight: to begin with, float [N, ...]: the scale becomes 2 mean |w| / sqrt(qmax) of each channel.
    """

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__(bits)
        self.scale = nn.Parameter(lsq_initial_scale(weight, bits, signed=True, dim=0))

    def channel_scale(self, weight: Tensor) -> Tensor:
        return self.scale.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Steps in few bits would move by too much or not at all.
        super()._apply(keeping_float32(fn, [self.scale]), recurse)  # type: ignore[no-untyped-call]
        return self


class MinMax(ScaledWeight):
    """Levels at integer multiples of each output channel's largest magnitude / qmax: for many bits.

    It has nothing to learn, so layers that share a weight share its grid.

    Args:
        bits: 1 to 8.
    """

    def channel_scale(self, weight: Tensor) -> Tensor:
        _, qmax = integer_range(self.bits, signed=True)
        # Four units in the last place more, so that the largest weight never counts as clipped.
        return weight.detach().flatten(1).abs().amax(1).float() / qmax * (1 + 2.0**-22)
