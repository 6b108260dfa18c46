"""`ActivationQuantizer`: LSQ on what a layer reads; the first batch sets its scale, training learns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olive.nn.keep_float32 import keeping_float32
from olive.ops.lsq import LEAST_SCALE, lsq, lsq_initial_scale

# Beside the formula's scale, so many are tried for the first batch: an eighth of it to eight times as much.
_FACTORS = tuple(2.0 ** (step / 4) for step in range(-12, 13))


class ActivationQuantizer(nn.Module):
    """x -> LSQ(x + offset) + offset_after, in x's shape and dtype.

    The first call sets the scale, and whether levels are signed, for the least squared error on its
    input, the mean over all processes where several train; before it the scale is zero. Scale and offsets
    are float32 parameters; all are 1-D, so that recipes that spare vectors from weight decay spare them (the
    Trainer of transformers goes by names, and does not).

    Args:
        bits: 1 to 8.
        shape: of the scale: 1, or the size of dimension `dim`; 0 = known from the first input on. (Where
            `dim` is -2, and the first input has no dimension before it, its rows are a batch, and share a
            scale.)
        dim: of the input, from its end, along which scales differ, e.g. -2 for each position in a sequence,
            -1 for each channel; ignored where there is one.
        channels: of the two learned offsets along the last dimension, which begin as zero; 0 = no offsets.
        signed: whether levels go below zero; None = as the first input shows.
        device: of the parameters.

    Source: arXiv:1902.08153; offsets and scales per position: the released code of arXiv:2302.02210.
    """

    signed: Tensor
    offset: nn.Parameter | None
    offset_after: nn.Parameter | None
    _written: tuple[int, int] | None  # which state of the buffer `signed` `_is_signed` was read from

    def __init__(
        self,
        bits: int,
        *,
        shape: int = 1,
        dim: int = -1,
        channels: int = 0,
        signed: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.dim = bits, dim
        self.scale = nn.Parameter(torch.zeros(shape, device=device))
        for name in ("offset", "offset_after"):
            value = nn.Parameter(torch.zeros(channels, device=device)) if channels else None
            self.register_parameter(name, value)
        self.register_buffer("signed", torch.tensor(signed is not False, device=device))
        self._fixed_sign = signed
        self._is_signed = signed is not False  # the buffer's value, known without asking the device
        self.is_initialized = False
        self._written = None

    @property
    def is_signed(self) -> bool:
        """Whether levels go below zero."""
        return self._is_signed

    def forward(self, input: Tensor) -> Tensor:
        """Quantize.

        Args:
            input: float [...].

        Raises:
            ValueError: another number of positions or channels than there are scales.
        """
        if not torch.compiler.is_compiling():
            self._look_for_writes()
        if self.offset is not None:
            input = input + self.offset.to(input.dtype)
        if not self.is_initialized:
            self._set_up(input.detach())
        self._check(input)
        input = lsq(input, self.scale.float(), self.bits, self._is_signed, self.dim)
        return input if self.offset_after is None else input + self.offset_after.to(input.dtype)

    def _check(self, input: Tensor) -> None:
        scales = self.scale.shape[0]
        if scales != 1 and input.shape[self.dim] != scales:
            raise ValueError(
                f"input: expected {scales} places along dimension {self.dim}, one for each scale, got "
                f"{tuple(input.shape)}; for sequences of several lengths use "
                f"QATConfig(activation_granularity='per_tensor')"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _set_up(self, input: Tensor) -> None:
        self.refresh()  # scales may have been loaded in place
        if not self.is_initialized:
            self.initialize(input)

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set scale and sign for the least squared error on an input, offset included.

        Raises:
            ValueError: NaN or infinity in the input.
        """
        if input.numel() == 0:
            raise ValueError(f"input: expected values in the first batch, got shape {tuple(input.shape)}")
        if self.scale.shape[0] == 0 and input.dim() < 3 and self.dim == -2:
            self.scale.data = torch.zeros(1, device=input.device)  # rows of a batch have no positions
        if self.scale.shape[0] == 0:  # one for each place
            self.scale.data = torch.zeros(input.shape[self.dim], device=input.device)
        self._check(input)
        dim = None if self.scale.shape[0] == 1 else self.dim
        choices = (True, False) if self._fixed_sign is None else (self._fixed_sign,)
        bases = [_mean_over_processes(lsq_initial_scale(input, self.bits, one, dim)) for one in choices]
        candidates = torch.stack([base * factor for base in bases for factor in _FACTORS]).clamp(LEAST_SCALE)
        signs = [one for one in choices for _ in _FACTORS]
        errors = torch.stack([self._errors(input, *one) for one in zip(candidates, signs, strict=True)])
        errors = _mean_over_processes(errors).view(len(choices), len(_FACTORS), -1)
        if not bool(errors.isfinite().all()):
            raise ValueError("input: expected finite values in the first batch, got NaN or Inf")
        best, where = errors.min(1)
        chosen = int(best.sum(1).argmin())
        scales = candidates.view(len(choices), len(_FACTORS), -1)[chosen]
        self.scale.copy_(scales.gather(0, where[chosen][None])[0])
        self._is_signed = choices[chosen]
        self.signed.fill_(self._is_signed)
        self.is_initialized, self._written = True, self._state()

    def _errors(self, input: Tensor, scale: Tensor, signed: bool) -> Tensor:
        """Squared error under each scale."""
        squares: Tensor = (lsq(input, scale, self.bits, signed, self.dim).float() - input.float()).square()
        if scale.shape[0] == 1:
            return squares.mean().view(1)
        others = [one for one in range(input.dim()) if one != self.dim % input.dim()]
        return squares.mean(others) if others else squares

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}scale")
        if stored is not None and self.scale.shape[0] == 0:
            self.scale.data = torch.zeros(stored.shape, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if stored is not None:
            self.refresh()

    def refresh(self) -> None:
        """Look up what the tensors say, after somebody else has written to them."""
        # Training may push a scale below zero, which counts as the least one.
        self.is_initialized = bool((self.scale.detach() != 0).any())
        self._is_signed, self._written = bool(self.signed), self._state()

    def _state(self) -> tuple[int, int]:
        version = 0 if self.signed.is_inference() else self.signed._version  # inference tensors have none
        return id(self.signed), version

    def _look_for_writes(self) -> None:
        """Refresh if somebody has written to `signed` in place: DDP as it is built, or a loader.

        The version is known without asking the device. DDP's writes before each pass leave it as it is.
        """
        if self._state() != self._written and not self.signed.is_meta:
            self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Steps in few bits would move by too much or not at all.
        super()._apply(keeping_float32(fn, self.parameters(recurse=False)), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        sign = "signed" if self._is_signed else "unsigned"
        ready = f"{sign}, scales={self.scale.shape[0]}" if self.is_initialized else "not initialized"
        return f"bits={self.bits}, {ready}, offsets={self.offset is not None}"


def _mean_over_processes(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
