"""Dampening: a loss that draws weights to the middle of their levels, so that they oscillate less.

A baseline to confidence-guided annealing.

Source: Nagel et al., arXiv:2203.11086, section on oscillation dampening.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olive.qat.latent import latent_weights


def dampening_loss(model: nn.Module) -> Tensor:
    """How far the latent weights are from the levels they are rounded to.

    The squared distance, of weights beyond the last levels none, summed over output channels and averaged
    over the values of each, summed over the low-bit weights. Its gradient reaches the latent weights
    alone. Add it to the loss, times a factor that grows while training goes on (the paper: from 0 to
    about 0.1).

    Args:
        model: prepared.

    Returns:
        float32 scalar.
    """
    terms = []
    for latent in latent_weights(model).values():
        weight = latent.trained().flatten(1).float()
        if weight.numel() == 0:  # of a sharded weight other processes have all rows
            terms.append(weight.sum())
            continue
        with torch.no_grad():
            grid = latent.weight_quantizer.grid(weight)
            level = grid.level(grid.code(weight))
            low, high = (grid.level(torch.full_like(weight, code)) for code in (grid.qmin, grid.qmax))
        terms.append((level - weight.clamp(low, high)).square().mean(1).sum())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
