"""`perplexity`: how well a causal language model predicts a text, by the protocols of the literature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from olive._progress import ProgressBar
from olive.eval.modes import device_of, evaluating

Protocol = Literal["standard", "paper"]
WINDOWS = {"standard": 2048, "paper": 1024}  # tokens
# Logits of one run of the model, in its own dtype, and those that are float32 at a time.
_RUN_LOGITS, _CHUNK_LOGITS = 1 << 24, 1 << 22


def perplexity(
    model: nn.Module,
    tokens: Tensor | str,
    *,
    tokenizer: Any = None,
    protocol: Protocol = "standard",
    window: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> float:
    """exp of the mean loss, in nats, over the predicted tokens of non-overlapping windows.

    The text is cut into windows from its start; a last, shorter one does not count. In each window every
    token but the first is predicted from those before it in the same window, so a window of W tokens adds
    W - 1 losses, and all losses weigh the same. They are computed in float32 and added up in float64.

    Args:
        model: a causal language model of transformers, or any module that is called with `input_ids` and
            `use_cache` and returns `logits`; quantized or not. Its training flags are restored.
        tokens: int64 [T] or [1, T], or a text.
        tokenizer: turns a text into tokens, without special tokens.
        protocol: "standard" has windows of 2048 tokens, as GPTQ and AWQ read WikiText-2; "paper" has 1024, as
            OliVe did.
        window: tokens per window instead, at least 2. Models with a shorter context need it; figures of
            different windows cannot be compared.
        batch_size: windows per run of the model; None = as many as give 2^24 logits, at least one.
        progress: show a bar on stderr if it takes longer than two seconds; None = only on a terminal.

    Returns:
        At least 1; inf if the model rules a token out or the mean loss overflows.

    Raises:
        TypeError: an argument of another type, a text without a tokenizer, or a model without logits.
        ValueError: a value out of range, a protocol's window longer than the model's context, a text shorter
            than one window, a token outside the vocabulary, or a loss that is NaN.

    Source: OliVe, arXiv:2304.07493, and GPTQ, arXiv:2210.17323, for the windows.
    """
    windows, batch = cut_windows({"model": model}, tokens, tokenizer, protocol, window, batch_size)
    losses: list[float] = []
    title = f"perplexity, {len(windows)} windows"
    with evaluating(model), torch.inference_mode(), ProgressBar(title, len(windows), progress) as bar:
        for part in windows.to(device_of(model)).split(batch):
            logits = logits_of(model, part)
            for one, expected in zip(logits, part, strict=True):
                losses.append(_loss(one, expected))
                check_loss(losses[-1], len(losses) - 1, logits.dtype)
            bar.advance(len(part))
    return exp_of_mean(losses, windows[:, 1:].numel())


def cut_windows(
    models: Mapping[str, nn.Module],
    tokens: Tensor | str,
    tokenizer: Any,
    protocol: Protocol,
    window: int | None,
    batch_size: int | None,
) -> tuple[Tensor, int]:
    """Check what a measure over windows is given, and cut the text.

    Args:
        models: those that will read it, by the names of their arguments.
        tokens, tokenizer, protocol, window, batch_size: of `perplexity`.

    Returns:
        int64 [windows, tokens of each], and how many of them one run of a model gets.

    Raises:
        TypeError, ValueError: as `perplexity`, or the models differ in their vocabularies.
    """
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    size = max(_window_of(model, protocol, window) for model in models.values())
    windows = _cut(_tokens_of(tokens, tokenizer), size)
    vocabulary: int | None = None
    for name, model in models.items():
        own = _text_setting(model, "vocab_size")
        if vocabulary is not None and own is not None:
            check_vocabulary(own, vocabulary, name)
        vocabulary = vocabulary if own is None else own
    _check_range(windows, vocabulary)
    return windows, batch_size or max(1, _RUN_LOGITS // (size * (vocabulary or _RUN_LOGITS)))


def logits_of(model: nn.Module, part: Tensor, name: str = "model") -> Tensor:
    """Run a model, called `name` in errors, on windows [B, W]: logits [B, W, V]."""
    logits = getattr(model(input_ids=part, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != part.shape:
        raise TypeError(
            f"{name}: expected a causal language model, whose output has logits [B, T, vocabulary], "
            f"got {type(model).__name__}"
        )
    return logits


def chunks(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [W, V] of one window in float32, few rows at a time, and the tokens that they predict.

    A vocabulary has up to 256k tokens: a float32 copy of all logits would be the largest tensor in the run.
    """
    rows = max(1, _CHUNK_LOGITS // logits.shape[-1])
    for one, expected in zip(logits[:-1].split(rows), tokens[1:].split(rows), strict=True):
        yield one.float(), expected.to(one.device)


def check_loss(loss: float, number: int, dtype: torch.dtype, name: str = "model") -> None:
    """Refuse a NaN as the loss of a window.

    Raises:
        ValueError: with the name of the model, the number of the window and the dtype of its logits.
    """
    if math.isnan(loss):
        raise ValueError(
            f"{name}: expected a finite loss, got NaN in window {number}; a weight or an "
            f"activation is NaN, or overflows {dtype}"
        )


def check_vocabulary(found: int, expected: int, name: str) -> None:
    """Refuse a model that predicts other tokens than the one before it."""
    if found != expected:
        raise ValueError(f"{name}: expected the model's vocabulary of {expected} tokens, got {found}")


def exp_of_mean(losses: list[float], count: int) -> float:
    """Perplexity of `count` tokens, from the sums of the losses of windows."""
    try:
        return math.exp(math.fsum(losses) / count)
    except OverflowError:
        return math.inf


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Sum of the losses of one window: logits [W, V], tokens [W]."""
    parts = [cross_entropy(one, expected, reduction="sum") for one, expected in chunks(logits, tokens)]
    return math.fsum(torch.stack(parts).tolist())


def _text_setting(model: nn.Module, key: str) -> int | None:
    """A number in the config of the model, or of its text part; None if there is none."""
    config: Any = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    value = getattr(config if getter is None else getter(), key, None)
    return value if isinstance(value, int) else None


def _window_of(model: nn.Module, protocol: str, window: int | None) -> int:
    if protocol not in WINDOWS:
        raise ValueError(f"protocol: expected {' or '.join(map(repr, WINDOWS))}, got {protocol!r}")
    if window is not None:
        if window < 2:
            raise ValueError(f"window: expected at least 2 tokens, got {window}")
        return window
    size = WINDOWS[protocol]
    positions = _text_setting(model, "max_position_embeddings")
    if positions is not None and positions < size:
        raise ValueError(
            f"window: expected at most the model's max_position_embeddings, {positions}, got {size} of "
            f"protocol {protocol!r}; pass window={positions}, or what the model was trained with"
        )
    return size


def _tokens_of(tokens: object, tokenizer: Any) -> Tensor:
    """int64 [T]."""
    if isinstance(tokens, str):
        if tokenizer is None:
            raise TypeError("tokenizer: expected one, because tokens is a text, got None")
        # verbose=False: the text is longer than the model's context, which the tokenizer would warn about.
        return torch.tensor(
            tokenizer(tokens, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
        )
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor or a text, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected int64, got {tokens.dtype}")
    if tokens.dim() == 2 and len(tokens) == 1:
        return tokens[0]
    if tokens.dim() != 1:
        raise ValueError(f"tokens: expected shape [T] or [1, T], got {list(tokens.shape)}")
    return tokens


def _cut(tokens: Tensor, window: int) -> Tensor:
    """Full windows [W, window]."""
    if len(tokens) < window:
        raise ValueError(f"tokens: expected at least one window of {window}, got {len(tokens)}")
    return tokens[: len(tokens) // window * window].view(-1, window)


def _check_range(tokens: Tensor, vocabulary: int | None) -> None:
    # On a GPU such a token would end the process's CUDA context.
    least, largest = (int(value) for value in tokens.aminmax())
    if least < 0 or (vocabulary is not None and largest >= vocabulary):
        wrong = least if least < 0 else largest
        below = "" if vocabulary is None else f", below {vocabulary}"
        raise ValueError(f"tokens: expected ids from 0{below}, got {wrong}")
