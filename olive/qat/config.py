"""`QATConfig`: how a model is prepared for quantization-aware training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from olive.ops.statsq import MAX_BITS, PER_CHANNEL

WEIGHTS = ("statsq", "lsq")
ACTIVATIONS = ("lsq",)
GRANULARITIES = ("per_tensor", "per_token")


@dataclass(frozen=True)
class QATConfig:
    """How the layers of a model are quantized while it is trained.

    Args:
        weight_bits: of every quantized layer but the first and the last, 1 to 8.
        activation_bits: of what these layers read, 1 to 8; None = not quantized.
        weights: "statsq" (levels from the weights' mean magnitude, nothing to learn) or "lsq" (a learned
            scale per output channel).
        activations: "lsq", a learned scale.
        group_size: of "statsq": columns of an output channel that share a scale; -1 = all.
        activation_granularity: "per_tensor", or "per_token": a scale for each position in a sequence of fixed
            length, as vision transformers have; `prepare` then needs a batch.
        activation_offsets: learn one offset per channel before and one after the quantizer of each layer's
            input. One that shifts a GELU's output lets it use all levels of an unsigned grid.
        quantize_attention: quantize the operands of attention's two products as well (queries, keys, values
            and probabilities) to `activation_bits`, in the architectures of
            `olive.qat.attention_classes.ATTENTIONS`. None = where `qkr` is used with `activation_bits`.
        qkr: compute attention's logits from one quantized matrix per head, W_q^T W_k, instead of from
            quantized queries and keys (query-key reparameterization).
        first_last_bits: of the layer that reads the model's input, and of its heads, weights and activations
            (weights by their largest magnitude in each output channel); None = these stay as they are.
        skip: module names left alone: a full name, or its last parts, or a pattern with * in it.

    Raises:
        ValueError: a value out of its set, or values that do not go together.
        TypeError: a value of another type.
    """

    weight_bits: int = 4
    activation_bits: int | None = None
    weights: str = "statsq"
    activations: str = "lsq"
    group_size: int = PER_CHANNEL
    activation_granularity: str = "per_tensor"
    activation_offsets: bool = False
    quantize_attention: bool | None = None
    qkr: bool = False
    first_last_bits: int | None = 8
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        for name in ("activation_bits", "first_last_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        _check_choice("weights", self.weights, WEIGHTS)
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("activation_granularity", self.activation_granularity, GRANULARITIES)
        for name in ("activation_offsets", "qkr"):
            _check_flag(name, getattr(self, name))
        self._check_group_size()
        self._check_attention()
        self._check_without_activations()
        if not isinstance(self.skip, (tuple, list)) or not all(isinstance(name, str) for name in self.skip):
            raise TypeError(f"skip: expected a tuple of module names, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))

    def _check_group_size(self) -> None:
        size = self.group_size
        if type(size) is not int or (size != PER_CHANNEL and size < 1):
            raise ValueError(f"group_size: expected {PER_CHANNEL} per channel, or columns, got {size!r}")
        if size != PER_CHANNEL and self.weights == "lsq":
            raise ValueError(f"group_size: expected {PER_CHANNEL} with weights 'lsq', got {size}")

    def _check_attention(self) -> None:
        if self.quantize_attention is None:
            value = self.qkr and self.activation_bits is not None
            object.__setattr__(self, "quantize_attention", value)
        else:
            _check_flag("quantize_attention", self.quantize_attention)
        if self.qkr and self.weights != "statsq":
            raise ValueError(
                f"qkr: expected False with weights {self.weights!r}, got True; the merged matrix has no "
                f"scale to learn, so use weights='statsq'"
            )

    def _check_without_activations(self) -> None:
        if self.activation_bits is not None:
            return
        for name in ("activation_granularity", "activation_offsets", "quantize_attention"):
            if getattr(self, name) not in (False, type(self).activation_granularity):
                raise ValueError(
                    f"{name}: expected the default without activation_bits, got {getattr(self, name)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QATConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field this version does not know, or a bad value.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"QATConfig: expected fields {sorted(known)}, got unknown {unknown}")
        return cls(**values)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> QATConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def _check_bits(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not 1 <= value <= MAX_BITS:
        raise ValueError(f"{name}: expected 1 to {MAX_BITS}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise TypeError(f"{name}: expected a bool, got {value!r}")
