"""`QuantConfig`: what `olive.quantize` does to a model. Validates itself and converts to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from olive.formats.activations import ACTIVATION_CODEBOOKS, ACTIVATION_FORMATS, PAPER, ActivationFormat
from olive.formats.codebooks import CODEBOOK_NAMES
from olive.formats.layout import PER_CHANNEL, check_group_size

FORMAT_VERSION = 1  # of the tensors in a checkpoint: codes, scale, codebook, activation_*
METHODS = ("search", "paper", "gptq")
BITS = (4, 8)
OVP8 = "ovp8"  # eight bits have one set of levels, so it stands where a codebook's name would
# OliVe's own two. Codebook "paper" is the one of least squared error on a tensor, the first on a tie.
PAPER_CODEBOOKS = ("int4", "flint4")
AUTO = "auto"  # per tensor the best of all
WEIGHT_CODEBOOKS = (*CODEBOOK_NAMES, PAPER, AUTO)


def _expect(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) not in {type(choice) for choice in allowed} or value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}: expected {'one of ' if len(allowed) > 1 else ''}{choices}, got {value!r}")


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        bits: bits per weight code: 4 or 8.
        codebook: "adaptive" (each group decides whether the pair rule holds in it), "nf4", "int4", "flint4",
            "learned" (tables fitted to each tensor), "auto" (the best of these on a tensor), or "paper" (int4
            or flint4, whichever has the least squared error on a tensor). Eight bits have no codebook: the
            default becomes "ovp8".
        group_size: columns that share a scale: 32, 64, 128; -1 per output channel, 0 per tensor.
        activations: what a layer's input becomes: None, it keeps the model's dtype; "int8"; "ovp4" or "ovp8",
            outlier-victim pairs of 4 and 8 bits.
        method: "search" tries many scales per group for the least squared error, which calibration data, if
            there are any, weigh by what reaches each column; "gptq" makes up for the error of each pair of
            columns in the later ones (4 bits, needs calibration data); "paper" is OliVe's own search (from 3
            sigma, the paper's pair rule) and goes with "int4", "flint4" and "paper", and with 8 bits.
            Activations follow the same pair rule.
        skip: module names left alone: a full name, or its last parts ("lm_head", "mlp.down_proj"), or a
            pattern with * in it.
        activation_group_size: columns of an activation that share a scale: -1 per token, 32, 64 or 128 per
            token and group; 0: one static scale per tensor, from calibration data.
        activation_codebook: of "ovp4": "int4", "flint4", "nf4", "adaptive", or, with static scales, "paper".
        damping: of "gptq": what is added to the diagonal of the inputs' second moments, in units of its mean.
        activation_order: of "gptq": pairs of columns with the largest inputs go first. Scales are then chosen
            before any error is made up for.
        rotate: rotate the residual stream by a Hadamard matrix that is folded into the weights, norms too:
            the same function with outliers spread over all channels. For Llama-like models of transformers
            (`olive.ptq.rotation.ROTATABLE`).
        rotate_online: with `rotate`, rotate what each `down_proj` reads as well, which no folding can do:
            while the model runs, in blocks of columns: the largest power of two that divides their number, up
            to 256 (`olive.ops.block_hadamard`). Channels of that input are balanced first, between `up_proj`
            and `down_proj`. Costs a small product at each call; for activations of 4 bits.

    Raises:
        ValueError: a value out of its set, or values that do not go together.
        TypeError: a value of another type.
    """

    bits: int = 4
    codebook: str = "adaptive"
    group_size: int = 128
    activations: str | None = None
    method: str = "search"
    skip: tuple[str, ...] = ("lm_head",)
    activation_group_size: int = PER_CHANNEL
    activation_codebook: str = "int4"
    damping: float = 0.01
    activation_order: bool = False
    rotate: bool = False
    rotate_online: bool = False

    quant_method: ClassVar[str] = (
        "olive"  # by which transformers finds the quantizer of a `quantization_config`
    )

    def __post_init__(self) -> None:
        _expect("bits", self.bits, BITS)
        check_group_size(self.group_size)
        _expect("method", self.method, METHODS)
        self._check_codebook()
        self._check_activations()
        self._check_gptq()
        _expect("rotate", self.rotate, (False, True))
        _expect("rotate_online", self.rotate_online, (False, True))
        if self.rotate_online and not self.rotate:
            raise ValueError("rotate_online: expected False without rotate=True, got True")
        if isinstance(self.skip, str) or not all(isinstance(name, str) for name in self.skip):
            raise TypeError(f"skip: expected a tuple of module names, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))

    def _check_codebook(self) -> None:
        if self.bits == 8:
            if self.codebook == type(self).codebook:
                object.__setattr__(self, "codebook", OVP8)
            if self.codebook != OVP8:
                raise ValueError(
                    f"codebook: expected 'ovp8' with bits=8, because 8-bit pairs have no codebook, "
                    f"got {self.codebook!r}"
                )
            return
        if self.codebook == OVP8:
            raise ValueError(
                "codebook: expected a 4-bit codebook with bits=4, got 'ovp8', which goes with bits=8"
            )
        _expect("codebook", self.codebook, WEIGHT_CODEBOOKS)
        if self.method == "paper" and self.codebook not in (*PAPER_CODEBOOKS, PAPER):
            raise ValueError(
                f"codebook: expected 'int4', 'flint4' or 'paper' with method 'paper', got {self.codebook!r}; "
                f"method 'search' takes every codebook"
            )

    def _check_activations(self) -> None:
        _expect("activations", self.activations, (None, *ACTIVATION_FORMATS))
        check_group_size(self.activation_group_size, "activation_group_size")
        _expect("activation_codebook", self.activation_codebook, ACTIVATION_CODEBOOKS)
        if self.activations is None and self.activation_group_size != PER_CHANNEL:
            raise ValueError(
                f"activation_group_size: expected -1 without activations, got {self.activation_group_size}"
            )
        if self.activations != "ovp4" and self.activation_codebook != type(self).activation_codebook:
            raise ValueError(
                f"activation_codebook: expected 'int4' unless activations is 'ovp4', "
                f"got {self.activation_codebook!r}"
            )
        if self.activation_codebook == PAPER and self.activation_group_size != 0:
            raise ValueError(
                "activation_codebook: expected 'int4', 'flint4', 'nf4' or 'adaptive' with dynamic scales, "
                "got 'paper', which is chosen from calibration data; use it with activation_group_size=0"
            )

    def _check_gptq(self) -> None:
        if type(self.damping) is not float or not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a float above 0 and up to 1, got {self.damping!r}")
        _expect("activation_order", self.activation_order, (False, True))
        if self.method != "gptq":
            for name in ("damping", "activation_order"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}: expected the default unless method is 'gptq'")
        elif self.bits == 8:
            raise ValueError(
                "method: expected 'search' or 'paper' with bits=8, got 'gptq', which makes 4 bits"
            )
        elif self.codebook == PAPER:
            raise ValueError(
                "codebook: expected 'auto' or one codebook with method 'gptq', got 'paper', which goes "
                "with the paper's search"
            )

    @property
    def needs_calibration(self) -> str | None:
        """What cannot be done without calibration data; None = it only helps, or fills the report."""
        if self.method == "gptq":
            return "method 'gptq'"
        static = self.activations is not None and self.activation_group_size == 0
        return "static activation scales" if static else None

    @property
    def activation_format(self) -> ActivationFormat | None:
        """How the inputs of quantized layers are quantized; None = they are not."""
        if self.activations is None:
            return None
        return ActivationFormat(
            self.activations,
            self.activation_group_size,
            self.activation_codebook,
            "paper" if self.method == "paper" else "optimal",
        )

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
