"""`QuantConfig`: what `olive.quantize` does to a model. Validates itself and converts to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from olive.formats.codebooks import CODEBOOK_NAMES
from olive.formats.layout import check_group_size

FORMAT_VERSION = 1  # of the tensors in a checkpoint: codes, scale, codebook
METHODS = ("search", "paper")
PAPER_CODEBOOKS = ("int4", "flint4")


def _expect(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) not in {type(choice) for choice in allowed} or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}: expected {'one of ' if len(allowed) > 1 else ''}{choices}, got {value!r}")


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        bits: bits per weight code; 4.
        codebook: "adaptive" (each group decides whether the pair rule holds in it), "nf4", "int4", "flint4",
            or "learned" (tables fitted to each tensor).
        group_size: columns that share a scale: 32, 64, 128; -1 per output channel, 0 per tensor.
        activations: None, activations keep the model's dtype.
        method: "search" tries many scales per group for the least squared error; "paper" is OliVe's own
            search (from 3 sigma, the paper's pair rule) and goes with "int4" or "flint4".
        skip: module names left alone: a full name, or its last parts ("lm_head", "mlp.down_proj"), or a
            pattern with * in it.

    Raises:
        ValueError: a value out of its set.
        TypeError: a value of another type.
    """

    bits: int = 4
    codebook: str = "adaptive"
    group_size: int = 128
    activations: str | None = None
    method: str = "search"
    skip: tuple[str, ...] = ("lm_head",)

    quant_method: ClassVar[str] = (
        "olive"  # by which transformers finds the quantizer of a `quantization_config`
    )

    def __post_init__(self) -> None:
        _expect("bits", self.bits, (4,))
        _expect("codebook", self.codebook, CODEBOOK_NAMES)
        check_group_size(self.group_size)
        _expect("activations", self.activations, (None,))
        _expect("method", self.method, METHODS)
        if self.method == "paper" and self.codebook not in PAPER_CODEBOOKS:
            raise ValueError(
                f"codebook: expected 'int4' or 'flint4' with method 'paper', got {self.codebook!r}; "
                f"method 'search' takes every codebook"
            )
        if isinstance(self.skip, str) or not all(isinstance(name, str) for name in self.skip):
            raise TypeError(f"skip: expected a tuple of module names, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field this version does not know, or a bad value.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"QuantConfig: expected fields {sorted(known)}, got unknown {unknown}")
        return cls(**{**values, **({"skip": tuple(values["skip"])} if "skip" in values else {})})

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> QuantConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def check_format_version(version: object, name: str = "format_version") -> None:
    """Refuse tensors written by a newer library.

    Raises:
        ValueError: not an int from 1 up to the version this library reads.
    """
    if type(version) is not int or version < 1:
        raise ValueError(f"{name}: expected an integer from 1 to {FORMAT_VERSION}, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{name}: expected at most {FORMAT_VERSION}, got {version}: this checkpoint was written by a "
            f"newer olive; upgrade with `pip install -U olive-quant`"
        )
