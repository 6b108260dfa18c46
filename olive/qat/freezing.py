"""Iterative freezing: a weight that oscillates too often is fixed for good where it was on average.

A baseline to confidence-guided annealing.

Source: Nagel et al., arXiv:2203.11086, section on iterative weight freezing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from olive.qat.latent import latent_weights
from olive.qat.steps import Attachment
from olive.qat.tracking import OscillationTracker

Schedule = Callable[[int], float | None]


class IterativeFreezing(Attachment):
    """Freezes oscillating weights after each step of an optimizer.

    Beside the tracker's buffers the model keeps `average`, a moving average of each
    code, and `fixed`, the code at which a weight is fixed for good.

    Args:
        model: prepared.
        optimizer: of torch's, or wrapped by accelerate.
        tracker: that follows the codes; it must not be attached to an optimizer itself.
        threshold: frequency above which a weight is fixed: a number, or what gives it for each step, counted
            from zero (None = fix nothing yet), e.g. a `CosineSchedule`.

    Raises:
        ValueError: a number out of 0 to 1, a model that is not prepared, or a tracker that is attached.
        TypeError: no optimizer of torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        tracker: OscillationTracker,
        threshold: float | Schedule,
    ) -> None:
        if not callable(threshold) and not 0 < threshold < 1:
            raise ValueError(f"threshold: expected between 0 and 1, got {threshold!r}")
        if tracker.is_attached:
            raise ValueError(
                "tracker: expected one that is not attached, got one that looks at an optimizer's steps "
                "itself, so each would count twice; call tracker.detach()"
            )
        self._tracker, self._step = tracker, 0
        self._threshold: Schedule = threshold if callable(threshold) else lambda _: threshold
        self._latents = latent_weights(model)
        for latent in self._latents.values():
            latent.shard()
            latent.average_codes()
        super().__init__(optimizer, restore=self._restore, observe=self._observe)

    @torch.no_grad()
    def _restore(self) -> None:
        for latent in self._latents.values():
            latent.put_back_fixed()

    @torch.no_grad()
    def _observe(self) -> None:
        self._tracker.update()
        threshold = self._threshold(self._step)
        for latent in self._latents.values():
            latent.fix(self._tracker.momentum, threshold)
        self._step += 1

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is; what is fixed lies in the model."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume."""
        self._step = state["step"]
