"""`OliveConfig`: what `config.json` of a quantized checkpoint says under `quantization_config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from olive.config import FORMAT_VERSION, QuantConfig, check_format_version
from olive.nn import ActivationFigures

WHERE = "quantization_config"


def _rounded(value: float | None, digits: int = 6) -> float | None:
    """For JSON, which has no infinity."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


class OliveConfig(QuantizationConfigMixin):
    """A `QuantConfig` with what a checkpoint needs besides: one flat JSON object.

    Args:
        quant: how the model was, or is to be, quantized.
        format_version: of the stored tensors.
        olive_version: library that wrote the checkpoint; for people to read.
        sqnr_db: full name of each weight that the checkpoint holds as codes -> its signal-to-quantization-
            noise ratio in dB, None if not known.
        activation_figures: the same names -> how well a calibration sample of the layer's input survives;
            those without one are missing.
        save_id: written by one `save_pretrained` here and in each of its files; tells a mixture of two saves.

    Raises:
        ValueError: a newer format version, an unknown field, or a bad value.
    """

    quant_method: Any = "olive"  # transformers types it as the enumeration of its own methods

    def __init__(
        self,
        quant: QuantConfig,
        *,
        format_version: int = FORMAT_VERSION,
        olive_version: str | None = None,
        sqnr_db: Mapping[str, float | None] | None = None,
        activation_figures: Mapping[str, Mapping[str, Any]] | None = None,
        save_id: str | None = None,
    ) -> None:
        check_format_version(format_version, f"{WHERE}.format_version")
        self.quant, self.format_version = quant, format_version
        self.olive_version, self.save_id = olive_version, save_id
        self.sqnr_db = dict(sqnr_db or {})
        self.activation_figures = {
            name: ActivationFigures(**figures) for name, figures in (activation_figures or {}).items()
        }

    @classmethod
    def of(cls, config: QuantConfig | OliveConfig) -> OliveConfig:
        """The same as an OliveConfig."""
        return config if isinstance(config, OliveConfig) else cls(config)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a ratio that is not finite is written as null."""
        figures = {
            name: {key: _rounded(value) for key, value in one.to_dict().items()}
            for name, one in self.activation_figures.items()
        }
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "olive_version": self.olive_version,
            **self.quant.to_dict(),
            "save_id": self.save_id,
            "sqnr_db": {name: _rounded(ratio, 3) for name, ratio in self.sqnr_db.items()},
            "activation_figures": figures,
        }

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> OliveConfig | tuple[OliveConfig, dict[str, Any]]:
        """The inverse of `to_dict`.

        Raises:
            ValueError: no or a newer `format_version`, a field this version does not know, or a bad value.
            TypeError: a value of another type.
        """
        values = dict(config_dict)
        # First of all: a newer format may have fields that are errors here, and upgrading is the way out.
        check_format_version(values.pop("format_version", None), f"{WHERE}.format_version")
        if (method := values.pop("quant_method", None)) != cls.quant_method:
            raise ValueError(f"{WHERE}.quant_method: expected {cls.quant_method!r}, got {method!r}")
        ratios = values.pop("sqnr_db", None)
        if not isinstance(ratios, Mapping):
            raise TypeError(
                f"{WHERE}.sqnr_db: expected an object with the names of the quantized weights, got {ratios!r}"
            )
        figures = values.pop("activation_figures", None)  # not in the first checkpoints
        known = {field.name for field in fields(ActivationFigures)}
        if figures is not None and not (
            isinstance(figures, Mapping)
            and all(isinstance(one, Mapping) and set(one) == known for one in figures.values())
        ):
            raise TypeError(
                f"{WHERE}.activation_figures: expected an object of objects with {', '.join(sorted(known))}, "
                f"got {figures!r}"
            )
        own = {key: values.pop(key, None) for key in ("olive_version", "save_id")}
        config = cls(QuantConfig.from_dict(values), sqnr_db=ratios, activation_figures=figures, **own)
        return (config, kwargs) if return_unused_kwargs else config
