"""A model whose logits are known, and a text for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import models


class Fixed(nn.Module):
    """The same logits [V] everywhere, or a row [V] for each position; remembers the inputs' shapes."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.shapes = nn.Parameter(logits), list[tuple[int, ...]]()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        assert not use_cache and not self.training
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def text(length: int) -> Tensor:
    return torch.randint(models.VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
