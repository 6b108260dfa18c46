"""Runs a float model on calibration data in the forms that users have it in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from olive.frameworks import framework_models

_KINDS = "a mapping, tuple, list, tensor or str"


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings: arguments of an operator, output of a model."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def check_batches(calibration: object) -> None:
    """Refuse what would be iterated over in a way that nobody means.

    Raises:
        TypeError: no iterable, or a single batch or text.
    """
    if isinstance(calibration, (str, bytes, Tensor, Mapping)):
        raise TypeError(
            f"calibration: expected an iterable of batches or texts, got a single "
            f"{type(calibration).__name__}; put it in a list"
        )
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration: expected an iterable of batches or texts, got {type(calibration).__name__}"
        )


class Call(NamedTuple):
    """Arguments of one run of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """Run the module on them."""
        return module(*self.args, **self.kwargs)


def calls(model: nn.Module, calibration: Iterable[Any], tokenizer: Any = None) -> Iterator[Call]:
    """What to run a model with: each batch, on the model's device.

    Mappings are passed as `model(**batch)`, tuples and lists as `model(*batch)`, tensors as `model(batch)`.
    Texts go through the tokenizer, one by one, cut to what the model takes; a text without a token is passed
    over. Models that cache keys and values are told not to: nothing reads them here.

    Args:
        model: not changed.
        calibration: batches or texts.
        tokenizer: for texts; None = that of the model's own library, loaded from where the model came from.

    Raises:
        TypeError: a batch of another type.
        ValueError: texts without a tokenizer, or a tokenizer of another model.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    caches = "use_cache" in inspect.signature(model.forward).parameters
    for number, batch in enumerate(calibration):
        if isinstance(batch, str):
            tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
            batch = _tokenized(model, tokenizer, batch)
            if batch is None:
                continue
        moved = _moved(batch, device)
        if isinstance(moved, dict):
            args: tuple[Any, ...] = ()
            kwargs: dict[str, Any] = moved
        elif isinstance(moved, (tuple, list)):
            args, kwargs = tuple(moved), {}
        elif isinstance(moved, Tensor):
            args, kwargs = (moved,), {}
        else:
            raise TypeError(f"calibration[{number}]: expected {_KINDS}, got {type(batch).__name__}")
        yield Call(args, {"use_cache": False, **kwargs} if caches else kwargs)


def run_batches(model: nn.Module, calibration: Iterable[Any], tokenizer: Any = None) -> Iterator[int]:
    """Run the model on each batch, in eval mode and without gradients, and count them as they are done.

    Training flags are restored at the end, whatever happens. Arguments and errors are those of `calls`.
    """
    with calibrating(model):
        for done, call in enumerate(calls(model, calibration, tokenizer), 1):
            call(model)
            yield done


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; training flags are restored."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        # Not inference_mode: what a model caches in a forward would stay an inference tensor, unfit for
        # training.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_moved(one, device) for one in value)
    return [_moved(one, device) for one in value] if isinstance(value, (list, tuple)) else value


def _tokenizer_of(model: nn.Module) -> Any:
    reason = "olive knows no library that the model is of"
    for framework, found in framework_models(model):
        if framework.tokenizer is None:
            continue
        try:
            return framework.tokenizer(found)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"tokenizer: expected one for calibration texts, got None and found none: {reason}; pass "
        f"olive.quantize(..., tokenizer=...), or batches of token ids"
    )


def _tokenized(model: nn.Module, tokenizer: Any, text: str) -> dict[str, Any] | None:
    longest = [
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    limit = min((size for size in longest if isinstance(size, int)), default=None)
    more = {"truncation": True, "max_length": limit} if limit is not None and limit < 1 << 30 else {}
    encoded = tokenizer(text, return_tensors="pt", **more)
    if not encoded["input_ids"].numel():
        return None
    largest, vocabulary = int(encoded["input_ids"].max()), vocabulary_of(model)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"tokenizer: expected the model's own, whose {vocabulary} tokens it embeds, got one that gives "
            f"token {largest}"
        )
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in encoded.items() if key in known}


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None if it does not say."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if getter is None else getter()
    except (AttributeError, NotImplementedError):  # models that embed no tokens say so in either way
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
