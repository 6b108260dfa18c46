"""Scales channels of a norm and the columns of its readers, takes that back, and checks what it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from olive.eval.norms import WEIGHT, Gain
from olive.eval.readers import Reader
from olive.ptq.batches import tensors_in


@dataclass
class Edit:
    """A change to some channels of a parameter, which remembers what they were.

    Args:
        values: view of the parameter with the channels last.
        channels: int64 [C].
        change: original values and factor to new values, in float32 or wider.
    """

    values: Tensor
    channels: Tensor
    change: Callable[[Tensor, float], Tensor]
    original: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.channels = self.channels.to(self.values.device)
        self.original = self.values[..., self.channels]  # a copy

    def apply(self, factor: float) -> None:
        """Change the original values; what an earlier call did is gone."""
        wide = torch.promote_types(self.original.dtype, torch.float32)
        new = self.change(self.original.to(wide), factor)
        self.values[..., self.channels] = new.to(self.original.dtype)

    def undo(self) -> None:
        """Write the original values, bit for bit."""
        self.values[..., self.channels] = self.original


def edits_of(norm: nn.Module, gain: Gain, readers: Iterable[Reader], channels: Tensor) -> list[Edit]:
    """What scales these channels of a norm's output and keeps what its readers compute."""
    edits = [Edit(norm.get_parameter("weight").detach(), channels, gain.scaled)]
    if norm._parameters.get("bias") is not None:
        edits.append(Edit(norm.get_parameter("bias").detach(), channels, WEIGHT.scaled))
    for reader in readers:
        edits.append(Edit(reader.weight.detach().movedim(reader.dim, -1), channels, torch.divide))
    return edits


def apply_all(groups: Iterable[list[Edit]], factor: float) -> None:
    """Change every norm and its readers."""
    for edits in groups:
        for edit in edits:
            edit.apply(factor)


def undo_all(groups: Iterable[list[Edit]]) -> None:
    """The inverse, also after an `apply_all` that did not come to its end."""
    for edits in groups:
        for edit in edits:
            edit.undo()


class Check:
    """Whether the model's output stays the same.

    Tried with the power of two at or above the factor: multiplying and dividing by that is exact, so rounding
    hides nothing even in bfloat16. What the factor would overflow, this does too.

    Args:
        before: output of `run` on the unchanged model.
        run: computes it again.

    Raises:
        ValueError: there is no float in `before`, or one that is not finite.
    """

    def __init__(self, before: list[Tensor], run: Callable[[], object]) -> None:
        self._run = run
        self._before = _floats(before)
        if not self._before:
            raise ValueError("sample: expected float tensors in the model's output, got none")
        if not all(bool(one.isfinite().all()) for one in self._before):
            raise ValueError("sample: expected finite outputs of the model, got NaN or Inf")

    def find_failing(self, edits: Mapping[nn.Module, list[Edit]], factor: float) -> list[nn.Module]:
        """Norms whose edits change the output. All edits are undone when this returns."""
        power = 2.0 ** math.ceil(math.log2(factor))
        if self._holds(edits.values(), power):
            return []
        failing = [norm for norm, own in edits.items() if not self._holds([own], power)]
        left = [own for norm, own in edits.items() if norm not in failing]
        return failing if self._holds(left, power) else list(edits)

    def _holds(self, groups: Iterable[list[Edit]], power: float) -> bool:
        groups = list(groups)
        # Gemma's weights round even so; and float16 has subnormal numbers.
        rounding = max(
            (torch.finfo(edit.values.dtype).eps for edits in groups for edit in edits), default=0.0
        )
        limit = max(1e-4, 8 * rounding)
        try:
            apply_all(groups, power)
            after = _floats(tensors_in(self._run()))
        finally:
            undo_all(groups)
        # Written so that NaN fails.
        return all(
            bool(((new - old).abs() <= limit * old.abs().max()).all())
            for old, new in zip(self._before, after, strict=True)
        )


def _floats(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Float tensors that are not empty, in float32 or wider."""
    floats = (one for one in tensors if one.is_floating_point() and one.numel())
    return [one.to(torch.promote_types(one.dtype, torch.float32)) for one in floats]
