"""`inject_outliers`: a large model's activation outliers in a small one, whose function stays the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olive.eval.edits import Check, Edit, apply_all, edits_of, undo_all
from olive.eval.modes import device_of, evaluating
from olive.eval.norms import Gain, find_norms, gain_of
from olive.eval.readers import Holders, Reader, find_readers
from olive.eval.trace import Reads, trace
from olive.walk import join

Sample = Mapping[str, Any] | Tensor
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NAMED_IN_ERRORS = 8  # norms
_UNSEEN = "the model's output changes: it is read in a way that cannot be seen, or its dtype overflows"


@dataclass(frozen=True)
class InjectedNorm:
    """A norm with outliers in its output.

    Args:
        name: its full name.
        channels: those of its output that are `factor` times as large.
        readers: full names of the modules whose columns are divided by it.
    """

    name: str
    channels: tuple[int, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A norm that stays as it is.

    Args:
        name: its full name.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class OutlierInjection:
    """What `inject_outliers` did.

    Args:
        factor: how much larger the channels are.
        norms: the changed norms.
        left_out: all others.
    """

    factor: float
    norms: tuple[InjectedNorm, ...]
    left_out: tuple[LeftOut, ...]


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    *,
    factor: float = 50.0,
    share: float = 0.005,
    seed: int = 0,
    sample: Sample | None = None,
) -> OutlierInjection:
    """Make a few channels in front of linear layers much larger, in place, keeping the model's function.

    Large language models have a few channels that are tens of times larger than the rest, and quantizing
    activations fails on them; small models do not. Here the weight (and bias) of a norm is multiplied by
    `factor` in a few channels, and the columns of the linear layers that read them are divided by it. A norm
    qualifies if its output is read by nothing but linear layers, fused experts and routers, none of which
    reads anything else or shares its weight, as is usual in models that normalize before each block.

    The channels are drawn once per width: every norm of a width gets the same, as outliers of large models
    stay in the same channels through the layers (LLM.int8(), arXiv:2208.07339).

    Without rounding the outputs are the same. In float32 they differ by about 1e-6 of their size. In bfloat16
    and float16 they differ by the rounding of the changed weights, and routers may choose another expert
    where two are nearly even; a `factor` that is a power of two rounds nothing there, unless a norm
    multiplies by 1 + weight.

    Args:
        model: a model with its weights in float32, bfloat16, float16 or float64, not quantized.
        factor: finite, above 1.
        share: of each norm's channels, above 0, at most 1; rounded, at least one channel.
        seed: of the draw.
        sample: what the model is run on to see who reads what: its keyword arguments, or its first one, such
            as int64 token ids [B, T]. Whatever it does not run is taken not to read anything. None = random
            token ids [2, 16].

    Returns:
        The changed norms with channels and readers, and the others with the reasons. On any error, and on
        Ctrl-C, the model is exactly as it was.

    Raises:
        TypeError: an argument of another type.
        ValueError: a value out of range, a quantized model, weights on the meta device, no norm that
            qualifies, outputs that are not finite, or no sample for a model without a vocabulary.
    """
    _check_arguments(model, factor, share, seed)
    holders = Holders(model)
    readers = find_readers(model, holders)
    args, kwargs = _call_of(model, sample)
    norms = {norm: name for name, norm in find_norms(model)}
    channels = {norm: _draw(norm, share, seed) for norm in norms}
    edits: dict[nn.Module, list[Edit]] = {}
    left_out: dict[nn.Module, str] = {}

    with evaluating(model):
        reads, output = trace(model, lambda: model(*args, **kwargs), norms, readers)
        check = Check(output, lambda: model(*args, **kwargs))
        for norm, name in norms.items():
            found = _gain_or_reason(norm, name, reads[norm], holders, readers, channels[norm])
            if isinstance(found, str):
                left_out[norm] = found
            else:
                own_readers = [readers[module] for module in reads[norm].readers]
                edits[norm] = edits_of(norm, found, own_readers, channels[norm])
        try:
            for norm in check.find_failing(edits, factor):
                left_out[norm] = _UNSEEN
                del edits[norm]
            if not edits:
                raise ValueError(_none_left(norms, left_out))
            injected = tuple(
                InjectedNorm(
                    name=norms[norm],
                    channels=tuple(channels[norm].tolist()),
                    readers=tuple(readers[module].name for module in reads[norm].readers),
                )
                for norm in edits
            )
            others = tuple(LeftOut(name, left_out[norm]) for norm, name in norms.items() if norm in left_out)
            apply_all(edits.values(), factor)
            return OutlierInjection(float(factor), injected, others)
        except BaseException:  # Ctrl-C
            undo_all(edits.values())
            raise


def _check_arguments(model: object, factor: float, share: float, seed: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not (math.isfinite(factor) and factor > 1):
        raise ValueError(f"factor: expected a finite number above 1, got {factor}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0, at most 1, got {share}")
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    for name, value in model.named_parameters():
        if value.is_meta:
            raise ValueError(
                f"{name}: expected a weight with values, got one on the meta device; "
                f"load the checkpoint first"
            )


def _call_of(model: nn.Module, sample: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for one run of the model."""
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if sample is not None:
        raise TypeError(f"sample: expected a tensor or a dict of inputs, got {type(sample).__name__}")
    getter = getattr(model, "get_input_embeddings", None)
    embedding = None if getter is None else getter()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"sample: expected inputs, because {type(model).__name__} has no vocabulary to draw from, "
            f"got None"
        )
    tokens = torch.randint(embedding.num_embeddings, (2, 16), generator=torch.Generator().manual_seed(0))
    return (tokens.to(device_of(model)),), {}


def _draw(norm: nn.Module, share: float, seed: int) -> Tensor:
    """Channels of a norm, int64 [C] in ascending order, on its device."""
    weight = norm.get_parameter("weight")
    count = max(1, round(share * len(weight)))
    drawn = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.sort().values.to(weight.device)


def _gain_or_reason(
    norm: nn.Module,
    name: str,
    reads: Reads,
    holders: Holders,
    readers: Mapping[nn.Module, Reader],
    channels: Tensor,
) -> Gain | str:
    """How the norm's weight scales its output, or why the norm is left out."""
    if reads.call is None:
        return "the sample does not run it"
    if reads.obstacle is not None:
        return reads.obstacle
    if not reads.readers:
        return "no linear layer reads its output"
    held = {join(name, key): value for key, value in norm._parameters.items() if value is not None}
    for full, parameter in held.items():
        if partner := holders.partner(full, parameter):
            return f"{full} is tied to {partner}"
    weights: dict[str, Tensor] = {readers[module].name: readers[module].weight for module in reads.readers}
    for full, value in {**held, **weights}.items():
        if value.dtype not in _DTYPES:
            return f"{full} is stored as {value.dtype}"
    return gain_of(norm, reads.call, channels) or "its output does not scale with its weight"


def _none_left(norms: Mapping[nn.Module, str], left_out: Mapping[nn.Module, str]) -> str:
    reasons = [f"{norms[norm]}: {reason}" for norm, reason in left_out.items()]
    more = len(reasons) - _NAMED_IN_ERRORS
    shown = "; ".join(reasons[:_NAMED_IN_ERRORS]) + (f"; and {more} more" if more > 0 else "")
    return f"model: expected a norm that only linear layers read, got none ({shown or 'it has no norms'})"
