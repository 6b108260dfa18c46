"""How often weights go to and fro between two codes while a model is trained.

A weight oscillates at a step if its code changes, and in the direction opposite to its last change. Of
that an exponential moving average is kept for each weight: its frequency.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olive.qat.annealing import BOUNDARY_RANGE, check_boundary_range
from olive.qat.latent import LatentWeight, latent_weights
from olive.qat.steps import Attachment

MOMENTUM = 0.001
THRESHOLD = 0.005
HISTOGRAM_BINS = 64


@dataclass(frozen=True)
class LayerOscillation:
    """What became of one weight.

    Args:
        values: how many there are, in all processes.
        oscillating: share whose frequency is above the threshold.
        at_boundary: share within the boundary range of a threshold.
    """

    values: int
    oscillating: float
    at_boundary: float


@dataclass(frozen=True)
class Oscillations:
    """What a tracker knows at one moment, as plain values: what a picture is drawn of.

    Args:
        layers: by the name of the weight.
        histogram: how many weights lie how far from their thresholds, as `OscillationTracker.histogram`.
        threshold, boundary_range: the tracker's.
    """

    layers: dict[str, LayerOscillation]
    histogram: list[float]
    threshold: float
    boundary_range: float


class OscillationTracker:
    """Follows the codes of a prepared model's low-bit weights.

    What it records lies in buffers of the model (`codes`, `direction` and `frequency` of each layer; six
    bytes per weight), so that a checkpoint resumes it exactly; make it before a checkpoint is loaded.

    Args:
        model: prepared.
        momentum: of the moving average.
        threshold: frequency above which a weight counts as oscillating.
        boundary_range: half width of the range around each threshold that is counted, in steps.
        optimizer: after whose steps to look; None = call `update` yourself.

    Raises:
        ValueError: a model that is not prepared, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float = MOMENTUM,
        threshold: float = THRESHOLD,
        boundary_range: float = BOUNDARY_RANGE,
        optimizer: Any = None,
    ) -> None:
        for name, value in (("momentum", momentum), ("threshold", threshold)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected between 0 and 1, got {value!r}")
        self.momentum, self.threshold = momentum, threshold
        self.boundary_range = check_boundary_range(boundary_range)
        self._latents = latent_weights(model)
        for latent in self._latents.values():
            latent.track()
        self._attached: Attachment | None = None
        if optimizer is not None:
            self.attach(optimizer)

    @torch.no_grad()
    def update(self) -> None:
        """Look at the weights: call it after each step of the optimizer. Waits for no device."""
        for latent in self._latents.values():
            latent.look(self.momentum, self.boundary_range)

    def attach(self, optimizer: Any) -> None:
        """Look at the weights after each step of this optimizer, of torch's or wrapped by accelerate.

        Where the model was sharded (FSDP2) after the tracker was made, what is recorded is sharded now.
        """
        self.detach()
        for latent in self._latents.values():
            latent.shard()
        self._attached = Attachment(optimizer, observe=self.update)

    @property
    def is_attached(self) -> bool:
        """Whether it looks at an optimizer's steps by itself."""
        return self._attached is not None

    def detach(self) -> None:
        """Stop looking at an optimizer's steps."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
            for latent in self._latents.values():
                latent.forget()

    @torch.no_grad()
    def layers(self) -> dict[str, LayerOscillation]:
        """Shares by the name of the weight. Waits for the device once.

        Raises:
            ValueError: NaN in a latent weight, with the layer's name.
        """
        counts = self._summed([self._counts(latent) for latent in self._latents.values()])
        found = {}
        for (name, _), row in zip(self._latents.items(), counts.tolist(), strict=True):
            values, oscillating, near, not_finite = row
            if not_finite:
                raise ValueError(f"{name}: expected finite latent weights, got {int(not_finite)} NaN or Inf")
            found[name] = LayerOscillation(int(values), oscillating / values, near / values)
        return found

    def _summed(self, parts: list[Tensor]) -> Tensor:
        """One row for each weight, of all its rows; of those that are not sharded this process has all."""
        sharded = torch.tensor([latent.is_sharded for latent in self._latents.values()])
        total = torch.stack(parts)
        if bool(sharded.any()):
            own = torch.where(sharded.to(total.device)[:, None], total, 0)
            whole = total - own
            dist.all_reduce(own)
            total = own + whole
        return total

    def _counts(self, latent: LatentWeight) -> Tensor:
        weight = latent.latent()
        frequency = latent.buffer("frequency")
        return torch.stack(
            [
                torch.tensor(float(weight.numel()), dtype=torch.float64, device=weight.device),
                (frequency > self.threshold).sum().double(),
                latent.inside(self.boundary_range).sum().double(),
                (~weight.isfinite()).sum().double(),
            ]
        )

    def shares(self) -> dict[str, float]:
        """Of all weights together, for logs: `oscillating` and `at_boundary`, 0 to 1."""
        layers = self.layers().values()
        total = sum(one.values for one in layers)
        return {
            "oscillating": sum(one.oscillating * one.values for one in layers) / total,
            "at_boundary": sum(one.at_boundary * one.values for one in layers) / total,
        }

    def snapshot(self) -> Oscillations:
        """What is known now. Where processes share weights, all of them must ask.

        Raises:
            ValueError: NaN in a latent weight, with the layer's name.
        """
        return Oscillations(self.layers(), self.histogram().tolist(), self.threshold, self.boundary_range)

    @torch.no_grad()
    def histogram(self, bins: int = HISTOGRAM_BINS) -> Tensor:
        """How many weights lie how far below (-) or above (+) their nearest threshold, of -0.5 to 0.5 steps.

        Weights that are further away from it lie beyond the last levels, and are left out.

        Returns:
            float64 [bins], in all processes.
        """
        parts = []
        for latent in self._latents.values():
            weight = latent.latent()
            if weight.numel() == 0:  # of a sharded weight other processes have all rows
                parts.append(torch.zeros(bins, dtype=torch.float64, device=weight.device))
                continue
            distance = latent.weight_quantizer.grid(weight).from_threshold(weight).double()
            parts.append(torch.histc(distance, bins, -0.5, 0.5))
        return self._summed(parts).sum(0).cpu()
