"""`layer_sqnr`: where in a model quantization errors arise, by the outputs of its layers."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olive.eval.modes import check_reference
from olive.ptq.batches import calibrating, calls
from olive.ptq.noise import decibels
from olive.walk import walk

_CHUNK_VALUES = 1 << 22  # outputs that are float64 at a time


def layer_sqnr(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of the output of every quantized linear layer.

    Both models run on the same batches, and each layer's output is compared with that of the layer of the
    same name in the reference. The noise is all that is in the output: that of the layer's own weight and
    activations, and what reaches it from the layers before. So figures tend to fall with depth; compare
    layers of one kind. Every position counts, padding too.

    Args:
        model: with quantized layers. Its training flags are restored.
        reference: usually what the model was before; its parameters may be on another device.
        batches: mappings, which are passed as `model(**batch)`, tuples or lists (`model(*batch)`), or tensors
            (`model(batch)`); iterated over once.

    Returns:
        Ratio in dB by the layer's full name, in the model's order, from energies that are added up in float64
        over all batches: inf if the outputs are the same, -inf if those of the reference are 0 and the
        model's are not. Layers that no batch reaches, such as those for images in batches of text, are
        missing; so are stacks of experts, which are no linear layers.

    Raises:
        TypeError: an argument or a batch of another type.
        ValueError: `model` and `reference` are one object, there is no quantized linear layer, the reference
            has no layer of that name, no batch or none that reaches a quantized layer, the two models run
            differently, or an output that is NaN or Inf.
    """
    check_reference(model, reference)
    _check_batches(batches)
    layers = [target for target in walk(model).quantized if target.kind in ("linear", "conv1d")]
    if not layers:
        raise ValueError(f"model: expected quantized linear layers, got none in {type(model).__name__}")
    comparer = _Comparer([target.name for target in layers])
    originals = _originals(reference, comparer.names)
    with ExitStack() as stack:
        for target in layers:
            original = originals[target.name]
            stack.callback(original.register_forward_hook(comparer.keeping(target.name)).remove)
            stack.callback(target.module.register_forward_hook(comparer.comparing(target.name)).remove)
        stack.enter_context(calibrating(model))
        stack.enter_context(calibrating(reference))
        first, second = itertools.tee(_checked(batches))
        done = 0
        for old, new in zip(calls(reference, first), calls(model, second), strict=True):
            old(reference)
            new(model)
            comparer.end_batch()
            done += 1
    if not done:
        raise ValueError("batches: expected at least one, got none")
    found = comparer.decibels()
    if not found:
        raise ValueError("batches: expected them to reach a quantized layer, got none that does")
    return found


def _check_batches(batches: object) -> None:
    if isinstance(batches, (str, bytes, Tensor, Mapping)):
        raise TypeError(
            f"batches: expected an iterable of batches, got a single {type(batches).__name__}; put it in a "
            f"list"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")


def _originals(reference: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    # All names: a layer may be registered twice, and go by its second name here.
    modules = dict(reference.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise ValueError(
                f"reference: expected a layer called {name}, as in the model, got none in "
                f"{type(reference).__name__}"
            )
    return {name: modules[name] for name in names}


def _checked(batches: Iterable[Any]) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, tuple, list, Tensor)):
            raise TypeError(
                f"batches[{number}]: expected a mapping, tuple, list or tensor, got {type(batch).__name__}"
            )
        yield batch


@dataclass
class _Energies:
    """Sums of squares of one layer's outputs."""

    signal: float = 0.0
    noise: float = 0.0
    calls: int = 0


class _Comparer:
    """Keeps the reference's outputs on one batch, and compares the model's with them as they come.

    Args:
        names: of the layers.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._energies = {name: _Energies() for name in names}
        self._kept: dict[str, deque[Tensor]] = {name: deque() for name in names}

    def keeping(self, name: str) -> Any:
        """A forward hook for the reference's layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            # A copy, because what follows may write into the output, as nn.ReLU(inplace=True) does.
            self._kept[name].append(_tensor(output, name, "reference").clone())

        return hook

    def comparing(self, name: str) -> Any:
        """A forward hook for the model's layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            found, kept = _tensor(output, name, "model"), self._kept[name]
            if not kept:
                raise _runs_differ(name, "it runs more often")
            expected = kept.popleft()
            if found.shape != expected.shape:
                raise _runs_differ(name, f"it gives {list(found.shape)}, not {list(expected.shape)}")
            if found.numel():  # single experts may get no tokens
                self._add(name, found, expected)

        return hook

    def _add(self, name: str, found: Tensor, expected: Tensor) -> None:
        energies = self._energies[name]
        energies.calls += 1
        sums = [torch.zeros(2, dtype=torch.float64)]
        parts = (one.reshape(-1).split(_CHUNK_VALUES) for one in (found, expected))
        for new, old in zip(*parts, strict=True):
            signal = old.to(new.device).double()
            noise = new.double() - signal
            sums.append(torch.stack((signal.square().sum(), noise.square().sum())).cpu())
        signal_energy, noise_energy = torch.stack(sums).sum(0).tolist()
        if not math.isfinite(signal_energy):
            raise _not_finite(name, "reference", expected)
        if not math.isfinite(noise_energy):
            raise _not_finite(name, "model", found)
        energies.signal += signal_energy
        energies.noise += noise_energy

    def end_batch(self) -> None:
        """After both models ran: nothing is kept for the next batch."""
        for name, kept in self._kept.items():
            if kept:
                raise _runs_differ(name, "it runs less often")

    def decibels(self) -> dict[str, float]:
        """The layers that ran."""
        ran = {name: one for name, one in self._energies.items() if one.calls}
        return {name: decibels(one.signal, one.noise) for name, one in ran.items()}


def _tensor(output: object, name: str, which: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"{which}: expected {name} to return a tensor, got {type(output).__name__}")
    return output


def _runs_differ(name: str, how: str) -> ValueError:
    return ValueError(
        f"model: expected {name} to run as in the reference, but {how}; layers that run on a choice, such as "
        f"single experts, cannot be compared"
    )


def _not_finite(name: str, which: str, output: Tensor) -> ValueError:
    return ValueError(
        f"{which}: expected finite outputs of {name}, got NaN or Inf; a weight or an activation is not, or "
        f"overflows {output.dtype}"
    )
