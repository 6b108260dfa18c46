"""`compare_causal`: how far a quantized language model is from its original, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from olive._progress import ProgressBar
from olive.eval.modes import check_reference, device_of, evaluating
from olive.eval.scoring import (
    Protocol,
    check_loss,
    check_vocabulary,
    chunks,
    cut_windows,
    exp_of_mean,
    logits_of,
)


@dataclass(frozen=True)
class CausalComparison:
    """What `compare_causal` found.

    Args:
        perplexity: of the model.
        reference_perplexity: of the reference.
        kl_divergence: mean of KL(reference || model) over the predicted tokens, in nats, at least 0; inf if
            the model rules out a token that the reference does not.
        agreement: share of the predicted tokens for which both models find the same token likeliest: 0 to 1.
        windows: how many windows were read.
        tokens: how many tokens were predicted in them.
    """

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    agreement: float
    windows: int
    tokens: int


def compare_causal(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor | str,
    *,
    tokenizer: Any = None,
    protocol: Protocol = "standard",
    window: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> CausalComparison:
    """Perplexity of a model and of its original, and how their predictions differ, on one text.

    Perplexity looks at nothing but the probability of the token in the text, and what some tokens gain makes
    up for what others lose. The divergence is above 0 wherever a prediction changes.

    The text is cut into windows, and every token of a window but the first is predicted, as in `perplexity`.
    Log-probabilities are computed in float32, the divergence is computed from them and added up in float64.

    Args:
        model: a causal language model of transformers, or any module that is called with `input_ids` and
            `use_cache` and returns `logits`; usually quantized. Its training flags are restored.
        reference: likewise, usually what the model was before; its parameters may be on another device.
        tokens: int64 [T] or [1, T], or a text.
        tokenizer: turns a text into tokens, without special tokens.
        protocol: "standard" has windows of 2048 tokens, "paper" of 1024.
        window: tokens per window instead, at least 2.
        batch_size: windows per run of each model; None = as many as give 2^24 logits, at least one.
        progress: show a bar on stderr if it takes longer than two seconds; None = only on a terminal.

    Returns:
        Both perplexities, which are those of `perplexity`, the divergence and the agreement.

    Raises:
        TypeError: an argument of another type, a text without a tokenizer, or a model without logits.
        ValueError: `model` and `reference` are one object or have different vocabularies, a value out of
            range, a protocol's window longer than a model's context, a text shorter than one window, a token
            outside the vocabulary, or a loss of either model that is NaN.

    Source: Dutta et al., Accuracy is Not All You Need, arXiv:2407.09141, for the divergence.
    """
    check_reference(model, reference)
    models = {"model": model, "reference": reference}
    windows, batch = cut_windows(models, tokens, tokenizer, protocol, window, batch_size)
    sums: list[_Sums] = []
    title = f"comparison, {len(windows)} windows"
    with (
        evaluating(model),
        evaluating(reference),
        torch.inference_mode(),
        ProgressBar(title, len(windows), progress) as bar,
    ):
        for part in windows.split(batch):
            logits, original = (logits_of(one, part.to(device_of(one)), name) for name, one in models.items())
            check_vocabulary(original.shape[-1], logits.shape[-1], "reference")
            for new, old, expected in zip(logits, original, part, strict=True):
                found = _compare(new, old, expected)
                check_loss(found.loss, len(sums), logits.dtype)
                check_loss(found.reference_loss, len(sums), original.dtype, "reference")
                sums.append(found)
            bar.advance(len(part))
    count = windows[:, 1:].numel()
    return CausalComparison(
        perplexity=exp_of_mean([one.loss for one in sums], count),
        reference_perplexity=exp_of_mean([one.reference_loss for one in sums], count),
        kl_divergence=math.fsum(one.divergence for one in sums) / count,
        agreement=sum(one.agreeing for one in sums) / count,
        windows=len(windows),
        tokens=count,
    )


@dataclass(frozen=True)
class _Sums:
    """Over the predicted tokens of one window."""

    loss: float
    reference_loss: float
    divergence: float
    agreeing: float


def _compare(logits: Tensor, reference: Tensor, tokens: Tensor) -> _Sums:
    """logits and reference [W, V], tokens [W]."""
    parts = []
    pairs = zip(chunks(logits, tokens), chunks(reference, tokens), strict=True)
    for (new, expected), (old, _) in pairs:
        old = old.to(new.device)
        agreeing = (new.argmax(-1) == old.argmax(-1)).sum()
        new, old = new.log_softmax(-1), old.log_softmax(-1)
        losses = (nll_loss(one, expected, reduction="sum") for one in (new, old))
        parts.append(torch.stack([one.double() for one in (*losses, _divergence(new, old), agreeing)]))
    return _Sums(*(math.fsum(column) for column in torch.stack(parts, dim=1).tolist()))


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Sum of KL(p || q) over rows of float32 log-probabilities [R, V]: float64, scalar."""
    log_q, log_p = log_q.double(), log_p.double()
    p, q = log_p.exp(), log_q.exp()
    # Where p is 0, so is its term, whatever q is: 0 * inf would be NaN.
    terms = ((log_p - log_q) * p).masked_fill(p == 0, 0.0)
    # In float32 the rows sum to 1 but for rounding, which is about as large as the divergence of two models
    # that are nearly the same, and has either sign. With q - p, whose exact sum is 0, each term is at least 0
    # and the error of the sums has an effect of second order only.
    return (terms + (q - p)).sum()
