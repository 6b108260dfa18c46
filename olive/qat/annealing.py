"""Confidence-guided annealing: freeze every weight that is not about to change its code.

A weight's confidence is its distance from the nearest threshold, in steps of its grid. Weights within the
boundary range are those that oscillate: they alone go on training, until they leave it.

Source: arXiv:2302.02210, its section on confidence-guided annealing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from olive.qat.latent import latent_weights
from olive.qat.steps import Attachment

BOUNDARY_RANGE = 0.005


def check_boundary_range(boundary_range: float) -> float:
    """Return it if weights can be so many steps from their nearest threshold.

    Raises:
        ValueError: not above 0 and up to 0.5.
    """
    if not 0 < boundary_range <= 0.5:
        raise ValueError(f"boundary_range: expected above 0 and up to 0.5 steps, got {boundary_range!r}")
    return float(boundary_range)


class Annealing(Attachment):
    """Freezes weights at every step of an optimizer; `anneal` makes one.

    Args:
        model: prepared.
        optimizer: of torch's, or wrapped by accelerate.
        boundary_range: half width of the range around each threshold in which weights train, in steps.
    """

    def __init__(self, model: nn.Module, optimizer: Any, boundary_range: float = BOUNDARY_RANGE) -> None:
        self.boundary_range = check_boundary_range(boundary_range)
        self._latents = latent_weights(model)
        super().__init__(optimizer, before=self._hold, restore=self._restore)

    def _hold(self) -> None:
        for latent in self._latents.values():
            latent.hold(~latent.inside(self.boundary_range))

    def _restore(self) -> None:
        for latent in self._latents.values():
            latent.restore()

    def detach(self) -> None:
        """Stop freezing, and free the copy of the weights; calling it again does nothing.

        Weights of layers train on. Frozen entries of merged matrices (`qkr`) stay where they are held, since
        W_q and W_k no longer say what they are.
        """
        super().detach()
        for latent in self._latents.values():
            latent.forget()

    def state_dict(self) -> dict[str, float]:
        """What a resumed run must have in common with this one; what is frozen follows from the weights."""
        return {"boundary_range": self.boundary_range}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Check that a run is resumed as it was.

        Raises:
            ValueError: it was run with another boundary range.
        """
        self.check_state(state, self.boundary_range)

    @staticmethod
    def check_state(state: Mapping[str, float], boundary_range: float) -> None:
        """Compare a boundary range with that of a saved run.

        Raises:
            ValueError: they differ.
        """
        if (saved := state["boundary_range"]) != boundary_range:
            raise ValueError(
                f"boundary_range: expected {saved}, with which this run was annealed before, got "
                f"{boundary_range}; resume with the same one, or start annealing from a model of an earlier "
                f"stage"
            )


def anneal(model: nn.Module, optimizer: Any, boundary_range: float = BOUNDARY_RANGE) -> Annealing:
    """From now on train only the weights of a prepared model that are about to change their codes.

    Frozen weights are after `optimizer.step()` what they were before it to the last bit, whatever the
    optimizer does (momentum, weight decay); queries and keys under `qkr` too. Scales, biases, norms,
    embeddings and the first and last layers train on. Meant for a last stage with a small constant
    learning rate.

    Args:
        model: prepared and trained.
        optimizer: that steps its parameters.
        boundary_range: half width of the range around each threshold in which weights train, in steps.

    Returns:
        What detaches it, and what to save with the optimizer to resume (`state_dict`).

    Raises:
        ValueError: a model that is not prepared, or a range out of 0 to 0.5.
        TypeError: no optimizer of torch's.

    Source: arXiv:2302.02210; its release leaves queries and keys out, and does nothing under AMP.
    """
    return Annealing(model, optimizer, boundary_range)
