"""Modules that multiply what they get by a weight: linear layers, fused experts and routers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from olive.config import QuantConfig
from olive.nn import EXPERT_WEIGHTS
from olive.walk import join, walk


@dataclass(frozen=True)
class Reader:
    """A module whose output depends on its input only through a product with its weight.

    Args:
        name: the module's full name.
        weight: its parameter.
        dim: the dimension of `weight` that belongs to the input's channels.
        known: its class says so. Of other modules, routers for one, every operator has to be looked at.
        tied_to: another parameter's name if the weight is that one as well, else None.
    """

    name: str
    weight: Tensor
    dim: int
    known: bool
    tied_to: str | None


class Holders:
    """Which modules hold a parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for key, value in module._parameters.items():
                if value is not None:
                    self._names.setdefault(id(value), []).append(join(name, key))

    def partner(self, name: str, parameter: Tensor) -> str | None:
        """Another name of the parameter called `name`, or None."""
        return next((other for other in self._names[id(parameter)] if other != name), None)


def find_readers(model: nn.Module, holders: Holders) -> dict[nn.Module, Reader]:
    """Every module that can be a reader.

    Raises:
        ValueError: a module quantized by OliVe, whose columns cannot be divided.
    """
    inventory = walk(model, QuantConfig(skip=()))
    if inventory.quantized:
        raise ValueError(
            f"model: expected a model that is not quantized, got quantized "
            f"{inventory.quantized[0].name or 'model'}; inject outliers before quantizing"
        )
    readers = {}
    for target in inventory.targets:
        key, dim = "weight", 1
        if target.kind == "conv1d":
            dim = 0
        elif target.kind == "experts":
            # The other stack, down_proj, multiplies what the activation function gives.
            key = next(key for key in EXPERT_WEIGHTS if key in target.module._parameters)
            dim = 1 if target.module.is_transposed else 2
        elif target.kind == "sorted_experts":
            continue  # Llama 4: the router's scores are multiplied in before, by its parent
        weight = target.parameters()[join(target.name, key)]
        readers[target.module] = Reader(target.name, weight, dim, known=True, tied_to=None)
    for name, module in model.named_modules():
        matrix = module._parameters.get("weight")
        if module not in readers and matrix is not None and matrix.dim() == 2:
            partner = holders.partner(join(name, "weight"), matrix)
            readers[module] = Reader(name, matrix, 1, known=False, tied_to=partner)
    return readers
