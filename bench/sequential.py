"""Quantizes a model layer by layer, each layer with the inputs that it gets once its predecessors are done.

This is what methods with second moments do with a whole model. Layers that are given one and the same tensor
(q, k and v) are a stage: the moment of their input is gathered once. Nothing is shared with `olive`'s own
sequence: the whole model runs up to each stage, which is slow, and simple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.baselines import Decoded
from olive import QuantConfig
from olive.walk import walk

Batch = Any  # a tensor, or a mapping of keyword arguments
Solver = Callable[[Tensor, Tensor], Decoded]  # weight [N, K], second moment [K, K]
SKIP = ("lm_head",)


class Layer(NamedTuple):
    """A layer to quantize."""

    name: str
    module: nn.Module
    weight: Tensor  # float32 [N, K], a view that can be written to


class _Stop(Exception):
    """Ends a run of the model where nothing after it is needed."""


def quantizable_layers(model: nn.Module, skip: tuple[str, ...] = SKIP) -> list[Layer]:
    """The layers that `olive.quantize` would quantize.

    Raises:
        ValueError: there is none, or one in a module other than nn.Linear and Conv1D.
    """
    layers = []
    for target in walk(model, QuantConfig(skip=skip)).targets:
        if target.kind not in ("linear", "conv1d"):
            raise ValueError(f"model: expected nn.Linear and Conv1D only, got {target.kind} at {target.name}")
        for name, parameter in target.parameters().items():
            weight = parameter.detach().t() if target.kind == "conv1d" else parameter.detach()
            layers.append(Layer(name, target.module, weight))
    if not layers:
        raise ValueError(f"model: expected quantizable modules, got none in {type(model).__name__}")
    return layers


def run(model: nn.Module, batch: Batch) -> None:
    """One forward pass, up to a hook that stops it."""
    try:
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
    except _Stop:
        return


def stages(model: nn.Module, layers: list[Layer], batch: Batch) -> list[list[Layer]]:
    """Layers in the order in which they run, those of one input together.

    Raises:
        ValueError: a layer that the batch does not reach.
    """
    found: list[list[Layer]] = []
    inputs: list[Tensor] = []  # kept, so that no tensor can take the identity of another

    def note(layer: Layer, args: tuple[Any, ...]) -> None:
        if any(layer is one for stage in found for one in stage):
            return
        if inputs and inputs[-1] is args[0]:
            found[-1].append(layer)
            return
        found.append([layer])
        inputs.append(args[0])

    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args))
        for layer in layers
    ]
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    reached = {layer.name for stage in found for layer in stage}
    if missing := [layer.name for layer in layers if layer.name not in reached]:
        raise ValueError(f"batches: expected data that reaches every layer, got none at {missing[0]}")
    return found


def second_moment(model: nn.Module, layer: Layer, batches: list[Batch]) -> tuple[Tensor, int]:
    """Sum of x x^T over the rows that reach a layer, float32 [K, K], and their number."""
    columns = layer.weight.shape[1]
    total, rows = torch.zeros(columns, columns), 0

    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal rows
        found = args[0].detach().reshape(-1, columns).float()
        total.addmm_(found.T, found)
        rows += len(found)
        raise _Stop

    hook = layer.module.register_forward_pre_hook(add)
    try:
        for batch in batches:
            run(model, batch)
    finally:
        hook.remove()
    return total, rows


def quantize_in_sequence(
    model: nn.Module, solver: Solver, batches: list[Batch], skip: tuple[str, ...] = SKIP
) -> dict[str, Decoded]:
    """Write decoded weights into the model, in place; what became of each weight, by name."""
    decoded: dict[str, Decoded] = {}
    for stage in stages(model, quantizable_layers(model, skip), batches[0]):
        moment, _ = second_moment(model, stage[0], batches)
        for layer in stage:
            decoded[layer.name] = solver(layer.weight.contiguous(), moment)
            layer.weight.copy_(decoded[layer.name].weight)
    return decoded
