"""Calibration data out of a text: windows of one length, as GPTQ and its successors take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def calibration_windows(
    text: str | Iterable[str], tokenizer: Any, *, window: int = 2048, count: int = 128
) -> list[Tensor]:
    """Cut a text into windows of tokens, for `olive.quantize(..., calibration=...)`.

    Windows follow each other without overlap; where there are more than wanted, they are taken evenly from
    the whole text. The last, shorter one does not count.

    Args:
        text: one text, or several, which are joined by empty lines.
        tokenizer: of the model; special tokens are not added.
        window: tokens in each; at most the model's context.
        count: how many at most.

    Returns:
        int64 [1, window] each.

    Raises:
        TypeError: neither a text nor texts.
        ValueError: window or count below 1, or a text shorter than one window.
    """
    for name, number in (("window", window), ("count", count)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    parts = [text] if isinstance(text, str) else list(text)
    if wrong := next((part for part in parts if not isinstance(part, str)), None):
        raise TypeError(f"text: expected a str or several, got {type(wrong).__name__}")
    # verbose=False: the text is longer than the model's context, which the tokenizer would warn about.
    found = tokenizer("\n\n".join(parts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(found, dtype=torch.int64)
    whole = len(tokens) // window
    if whole == 0:
        raise ValueError(
            f"text: expected at least one window of {window} tokens, got {len(tokens)} tokens; pass more "
            f"text or a shorter window"
        )
    windows = tokens[: whole * window].view(whole, 1, window)
    return [windows[index * whole // count] for index in range(count)] if whole > count else list(windows)
