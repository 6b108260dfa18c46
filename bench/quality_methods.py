"""What the quality comparison compares: a format, what data may do to it, and whose implementation it is.

Every method does two things: quantize a whole model, and quantize one layer whose inputs have a given second
moment. OVP's rows go through `olive.quantize`, so they are what a user gets; other formats are decoded into
the float layers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import olive
from bench.baselines import BASELINES, ONLY_BLOCK, Decoded
from bench.gptq_int import gptq_int
from bench.peers_quality import GPTQ_GROUP, data_free_peers, gptq_peers
from bench.sequential import SKIP, Batch, Solver, quantizable_layers, quantize_in_sequence
from olive import QuantConfig, ops
from olive.ptq.moments import SecondMoment
from olive.ptq.parameter import quantize_parameter

NO_DATA, IMPORTANCE, GPTQ, GPTQ_ORDERED = "none", "importance", "GPTQ", "GPTQ, activation order"
# The same on text that the model wrote itself, or random tokens: `olive.synthetic_windows`.
OWN_IMPORTANCE, OWN_GPTQ = "importance, own text", "GPTQ, own text"
OWN = "own definition"  # written here from the definition, for want of the package or beside it
OLIVE = "olive"
AT_ONCE = 8  # windows of own text in a batch
PAPER = replace(
    olive.presets.paper_w4a4(), activations=None, activation_group_size=-1, activation_codebook="int4"
)
DATA_FREE = {  # baselines, and the columns that share a scale: 128, unless the format has its own
    "NF4, absmax": (128, 64),
    "NF4, double quantization": (128, 64),
    "int4 asymmetric": (128,),
    "int4 symmetric": (128,),
    "HQQ": (128, 64),
    **{name: (block,) for name, block in ONLY_BLOCK.items()},
}


class Inputs(NamedTuple):
    """What is known of the inputs of one layer."""

    second_moment: Tensor  # float32 [K, K]
    rows: int


class Quantized(NamedTuple):
    """A model that computes with quantized weights, and these weights."""

    model: nn.Module
    weights: dict[str, Tensor]  # decoded, [N, K], by name
    bits_per_weight: float


@dataclass(frozen=True)
class Method(ABC):
    """One row of the table.

    Args:
        format: its name.
        calibration: what data do: "none", "importance" (errors are weighed by what reaches each column),
            "GPTQ", or "GPTQ, activation order"; "own text" where they are made by the model.
        implementation: "olive", "own definition", or a package with its version.
        group_size: columns that share a scale; -1 per channel.
    """

    format: str
    calibration: str
    implementation: str
    group_size: int

    @property
    def title(self) -> str:
        """For people."""
        data = "" if self.calibration == NO_DATA else f", {self.calibration}"
        size = "" if self.group_size == 128 else f", group {self.group_size}"
        who = "" if self.implementation in (OLIVE, OWN) else f" ({self.implementation})"
        return f"{self.format}{data}{size}{who}"

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated first: only Llama-like ones can be, and weights are others then."""
        return False

    @property
    def calibrates_itself(self) -> bool:
        """Whether it takes a model to make its own data."""
        return self.calibration in (OWN_IMPORTANCE, OWN_GPTQ)

    @abstractmethod
    def quantize(self, model: nn.Module, batches: list[Batch], skip: tuple[str, ...] = SKIP) -> Quantized:
        """Quantize a copy of a model; batches are what it may be calibrated on."""

    @abstractmethod
    def layer(self, weight: Tensor, inputs: Inputs) -> Decoded:
        """Quantize one weight [N, K]."""


@dataclass(frozen=True)
class OVP(Method):
    """Outlier-victim pairs, by `olive.quantize`."""

    config: QuantConfig

    @property
    def rotates(self) -> bool:
        """As in the base class."""
        return self.config.rotate

    def quantize(self, model: nn.Module, batches: list[Batch], skip: tuple[str, ...] = SKIP) -> Quantized:
        """As in the base class."""
        quantized = copy.deepcopy(model)
        data: list[Batch] | None = None if self.calibration == NO_DATA else batches
        if self.calibrates_itself:
            data = list(torch.cat(olive.synthetic_windows(model)).split(AT_ONCE))
        olive.quantize(quantized, replace(self.config, skip=skip), calibration=data, progress=False)
        bits = olive.report(quantized).bits_per_weight
        decoded = olive.dequantize(copy.deepcopy(quantized))
        weights = {layer.name: layer.weight for layer in quantizable_layers(decoded, skip)}
        return Quantized(quantized, weights, bits)

    def layer(self, weight: Tensor, inputs: Inputs) -> Decoded:
        """As in the base class."""
        known = {} if self.calibration == NO_DATA else {"weight": SecondMoment(*inputs)}
        stored = quantize_parameter(weight, self.config, moments=known)
        assert stored.codebook is not None
        tensors = (stored.codes, stored.scale, stored.codebook)
        matrix = ops.ovp_decode(*tensors, weight.shape[1], self.group_size, weight.dtype)
        bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
        return Decoded(matrix, bits / weight.numel())


@dataclass(frozen=True)
class DataFree(Method):
    """A format that looks at the weight only."""

    decode: Callable[[Tensor, int], Decoded]

    def quantize(self, model: nn.Module, batches: list[Batch], skip: tuple[str, ...] = SKIP) -> Quantized:
        """As in the base class."""
        quantized = copy.deepcopy(model)
        decoded = {}
        for layer in quantizable_layers(quantized, skip):
            decoded[layer.name] = self.decode(layer.weight.contiguous(), self.group_size)
            layer.weight.copy_(decoded[layer.name].weight)
        return _quantized(quantized, decoded)

    def layer(self, weight: Tensor, inputs: Inputs) -> Decoded:
        """As in the base class."""
        return self.decode(weight, self.group_size)


@dataclass(frozen=True)
class Sequential(Method):
    """A format that makes up for errors, layer after layer."""

    solver: Solver

    def quantize(self, model: nn.Module, batches: list[Batch], skip: tuple[str, ...] = SKIP) -> Quantized:
        """As in the base class."""
        quantized = copy.deepcopy(model)
        return _quantized(quantized, quantize_in_sequence(quantized, self.solver, batches, skip))

    def layer(self, weight: Tensor, inputs: Inputs) -> Decoded:
        """As in the base class."""
        return self.solver(weight, inputs.second_moment)


def _quantized(model: nn.Module, decoded: dict[str, Decoded]) -> Quantized:
    values = sum(one.weight.numel() for one in decoded.values())
    bits = sum(one.bits_per_weight * one.weight.numel() for one in decoded.values()) / values
    return Quantized(model, {name: one.weight for name, one in decoded.items()}, bits)


def _ovp_methods() -> list[Method]:
    found: list[Method] = [OVP("OVP paper preset", NO_DATA, OLIVE, PAPER.group_size, PAPER)]
    for codebook in ("nf4", "adaptive", "learned", "auto"):
        search = QuantConfig(codebook=codebook)
        gptq = replace(search, method="gptq")
        settings = [(NO_DATA, search), (IMPORTANCE, search), (GPTQ, gptq)]
        if codebook in ("adaptive", "learned"):
            settings.append((GPTQ_ORDERED, replace(gptq, activation_order=True)))
        found += [
            OVP(f"OVP {codebook}", calibration, OLIVE, config.group_size, config)
            for calibration, config in settings
        ]
        if codebook in ("adaptive", "learned"):
            found += [
                *(
                    OVP(f"OVP {codebook}", calibration, OLIVE, config.group_size, config)
                    for calibration, config in ((OWN_IMPORTANCE, search), (OWN_GPTQ, gptq))
                ),
                *(
                    OVP(f"OVP {codebook}, rotated", calibration, OLIVE, config.group_size, config)
                    for calibration, config in (
                        (NO_DATA, replace(search, rotate=True)),
                        (GPTQ, replace(gptq, rotate=True)),
                    )
                ),
            ]
    return found


def _int4_gptq_methods() -> list[Method]:
    solvers: list[tuple[str, str, Solver]] = [
        (GPTQ, OWN, partial(gptq_int, group_size=GPTQ_GROUP)),
        (GPTQ_ORDERED, OWN, partial(gptq_int, group_size=GPTQ_GROUP, activation_order=True)),
        *gptq_peers(),
    ]
    return [
        Sequential("int4 asymmetric", calibration, who, GPTQ_GROUP, solver)
        for calibration, who, solver in solvers
    ]


def methods() -> list[Method]:
    """All that run here. Where a package is installed, it takes the place of our own definition.

    GPTQ is there in both: its users differ in the order of columns, the damping and the grids.
    """
    peers = data_free_peers()
    replaced = {(name, size) for name, _, size, _ in peers}
    own = [
        DataFree(name, NO_DATA, OWN, size, BASELINES[name])
        for name, sizes in DATA_FREE.items()
        for size in sizes
        if (name, size) not in replaced
    ]
    packages = [DataFree(name, NO_DATA, package, size, decode) for name, package, size, decode in peers]
    return [*_ovp_methods(), *own, *packages, *_int4_gptq_methods()]


def quick_methods() -> list[Method]:
    """One of each kind."""
    names = ("OVP adaptive", "int4 asymmetric", "NVFP4")
    return [one for one in methods() if one.format in names and one.implementation in (OLIVE, OWN)]
