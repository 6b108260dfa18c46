"""Greedy generation with a cache of fixed size, so that one step is the same kernels on the same memory.

That is what a CUDA graph needs: a replay is the whole step, with no work left to Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import capture

_WARM_UP = 2  # steps before the capture


def repeat(step: Callable[[], object], count: int) -> None:
    """Make a step so many times."""
    for _ in range(count):
        step()


class StaticDecoder:
    """Generates one token per step for a batch of prompts of one length.

    Args:
        model: a causal language model of transformers.
        batch: how many prompts.
        length: tokens that the cache holds; more than that must not be generated.

    Attributes:
        tokens: int64 [batch, 1], the tokens generated last: input and output of a step.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def _forward(self, tokens: Tensor) -> None:
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    def start(self, prompt: Tensor) -> None:
        """Forget what was generated, read prompts [batch, tokens] and generate their first token."""
        self.cache.reset()
        self._forward(prompt)

    def step(self) -> None:
        """Generate a token for every prompt."""
        self._forward(self.tokens)

    def captured(self, prompt: Tensor) -> Callable[[], object]:
        """`step` as the replay of a CUDA graph; call `start` before using it."""
        self.start(prompt)  # makes the cache's tensors, which the graph writes to
        return capture(self.step, partial(repeat, self.step, _WARM_UP)).replay

    def generate(self, prompt: Tensor, count: int, step: Callable[[], object] | None = None) -> Tensor:
        """`count` tokens after each prompt, [batch, count], by `step` or a capture of it."""
        self.start(prompt)
        generated = [self.tokens.clone()]
        for _ in range(count - 1):
            (step or self.step)()
            generated.append(self.tokens.clone())
        return torch.cat(generated, dim=1)
