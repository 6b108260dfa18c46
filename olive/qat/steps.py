"""What happens around each step of an optimizer, in a fixed order whoever registered first.

Before the step weights are held; after it what is frozen is restored first, and only then looked at. The
hooks are torch's own, so a `GradScaler`, accumulation of gradients, DDP, FSDP2 and accelerate pass
through them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

_PHASES: weakref.WeakKeyDictionary[torch.optim.Optimizer, Steps] = weakref.WeakKeyDictionary()


class Steps:
    """Callbacks around the steps of one optimizer: `before`, then the step, `restore`, `observe`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.before: list[Callable[[], None]] = []
        self.restore: list[Callable[[], None]] = []
        self.observe: list[Callable[[], None]] = []
        optimizer.register_step_pre_hook(lambda *_: self._run(self.before))
        optimizer.register_step_post_hook(lambda *_: self._run(self.restore, self.observe))

    @staticmethod
    def _run(*phases: list[Callable[[], None]]) -> None:
        for phase in phases:
            for one in list(phase):
                one()


def steps_of(optimizer: Any) -> Steps:
    """The callbacks of an optimizer, of torch's or wrapped by accelerate.

    Raises:
        TypeError: neither.
    """
    while (wrapped := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = wrapped
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if optimizer not in _PHASES:
        _PHASES[optimizer] = Steps(optimizer)
    return _PHASES[optimizer]


class Attachment:
    """Something that acts at an optimizer's steps until it is detached."""

    def __init__(
        self,
        optimizer: Any,
        *,
        before: Callable[[], None] | None = None,
        restore: Callable[[], None] | None = None,
        observe: Callable[[], None] | None = None,
    ) -> None:
        steps = steps_of(optimizer)
        wanted = ((steps.before, before), (steps.restore, restore), (steps.observe, observe))
        self._places = [(phase, call) for phase, call in wanted if call is not None]
        for phase, call in self._places:
            phase.append(call)

    def detach(self) -> None:
        """Stop acting; calling it again does nothing."""
        for phase, call in self._places:
            phase.remove(call)
        self._places = []
