"""Calibration data out of the model itself, for those who have none: what it writes, or tokens at random.

A causal language model draws text from its own predictions, as LLM-QAT (arXiv:2305.17888) does for training
and self-calibration (arXiv:2410.17170) for quantization. A model that predicts no next token is given tokens
drawn at random, all of its vocabulary alike: norms, gates and biases then leave their mark on what reaches
each layer, as they do with real text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from olive.ptq.batches import calibrating, vocabulary_of

WRITTEN, DRAWN = 256, 32  # tokens in a window that the model writes, and in a random one
TOKENS = 1 << 14  # in all windows together
AT_ONCE = 16  # windows written together: bounds the keys and values that are cached meanwhile


def synthetic_windows(
    model: nn.Module, *, window: int | None = None, count: int | None = None, seed: int = 0
) -> list[Tensor]:
    """Make windows of tokens for `olive.quantize(..., calibration=...)` without any text.

    A causal language model of transformers writes them: each token is drawn from its prediction, at
    temperature 1, in eval mode. The first one is the token that begins a text, or drawn at random where the
    model's config names none. For every other model tokens are drawn at random, each as likely as the others.

    Args:
        model: with a vocabulary, float, on any device. Its training flags are restored.
        window: tokens in each; at most the model's context. None = 256 where the model writes, else 32, or
            the context if that is less: random tokens do best in windows as long as the texts to come.
        count: how many windows; None = as many as hold 16384 tokens.
        seed: of the draws; nothing else is random. On another device rounding may change a text.

    Returns:
        int64 [1, window] each, on the CPU.

    Raises:
        TypeError: not a module.
        ValueError: a model without a vocabulary or on the meta device, window or count below 1, a window
            longer than the context, or predictions that are not finite.

    Source: LLM-QAT, arXiv:2305.17888, section 2.1, which draws the first tokens otherwise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise ValueError(
            f"model: expected one with a vocabulary to draw from, got {type(model).__name__}, which embeds "
            f"no tokens"
        )
    first = next(model.parameters())
    if first.is_meta:
        raise ValueError(
            "model: expected weights with values, got the meta device; load the checkpoint first"
        )
    for name, number in (("window", window), ("count", count)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    longest = context if isinstance(context, int) and context > 0 else None
    writes = _writes(model, config)
    if window is None:
        window = WRITTEN if writes else DRAWN
        window = window if longest is None else min(window, longest)
    elif longest is not None and window > longest:
        raise ValueError(f"window: expected at most the model's context of {longest} tokens, got {window}")
    count = -(-TOKENS // window) if count is None else count
    generator = torch.Generator().manual_seed(seed)
    if not writes:
        return list(torch.randint(vocabulary, (count, 1, window), generator=generator))
    start = getattr(config, "bos_token_id", None)
    found: list[Tensor] = []
    with calibrating(model):
        while len(found) < count:
            begun = torch.randint(vocabulary, (min(AT_ONCE, count - len(found)), 1), generator=generator)
            if isinstance(start, int) and 0 <= start < vocabulary:
                begun = torch.full_like(begun, start)
            found += _written(model, begun, window, vocabulary, generator, first.device).split(1)
    return found


def _writes(model: nn.Module, config: Any) -> bool:
    """Whether it is a decoder that predicts the next token."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not getattr(config, "is_encoder_decoder", False)


def _written(
    model: nn.Module,
    tokens: Tensor,
    window: int,
    vocabulary: int,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Texts begun with tokens [B, 1], written on to [B, window]."""
    cache = None
    while tokens.shape[1] < window:
        seen: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        new = tokens if cache is None else tokens[:, -1:]
        output = model(input_ids=new.to(device), use_cache=True, **seen)
        # Models without keys and values to cache, state-space ones for instance, read all of it again.
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1, :vocabulary].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("model: expected finite predictions, got NaN or Inf")
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens
