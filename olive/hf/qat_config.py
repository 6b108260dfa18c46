"""`OliveQATConfig`: what `config.json` says of a model after quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from olive.config import check_format_version
from olive.hf.config import WHERE

QAT_METHOD = "olive_qat"
QAT_FORMAT_VERSION = 1


class OliveQATConfig(QuantizationConfigMixin):
    """The layers of integers of a checkpoint.

    Args:
        layers: full name -> what the layer is built with (`olive.hf.converted.describe`).
        format_version: of the stored tensors.
        olive_version: library that wrote the checkpoint; for people to read.

    Raises:
        ValueError: a newer format version.
        TypeError: layers that are no object.
    """

    quant_method: Any = QAT_METHOD  # transformers types it as the enumeration of its own methods

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]],
        *,
        format_version: int = QAT_FORMAT_VERSION,
        olive_version: str | None = None,
    ) -> None:
        check_format_version(format_version, f"{WHERE}.format_version")
        if not isinstance(layers, Mapping) or not all(isinstance(one, Mapping) for one in layers.values()):
            raise TypeError(f"{WHERE}.layers: expected an object of objects, got {layers!r}")
        self.layers = {name: dict(one) for name, one in layers.items()}
        self.format_version, self.olive_version = format_version, olive_version

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "olive_version": self.olive_version,
            "layers": {name: dict(one) for name, one in self.layers.items()},
        }

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> OliveQATConfig | tuple[OliveQATConfig, dict[str, Any]]:
        """The inverse of `to_dict`.

        Raises:
            ValueError: no or a newer `format_version`, another method, or a field this version does not know.
            TypeError: a value of another type.
        """
        values = dict(config_dict)
        check_format_version(values.get("format_version"), f"{WHERE}.format_version")
        if (method := values.pop("quant_method", None)) != cls.quant_method:
            raise ValueError(f"{WHERE}.quant_method: expected {cls.quant_method!r}, got {method!r}")
        unknown = sorted(set(values) - {"layers", "format_version", "olive_version"})
        if unknown or "layers" not in values:
            raise ValueError(f"{WHERE}: expected layers and format_version, got {sorted(values)}")
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config
