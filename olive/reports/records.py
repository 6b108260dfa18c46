"""`Report` and `LayerReport`: the figures of a quantized model, and the forms they are shown in."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olive.walk import Skipped


@dataclass(frozen=True)
class LayerReport:
    """Figures of one quantized weight, or of one stack of experts' weights.

    Args:
        name: of the module; of the stack, for experts.
        kind: "linear", "conv1d", "experts" or "sorted_experts".
        shape: (N, K), or (E, N, K) for a stack of E experts.
        codebook: its name; "learned" if its tables are none of the fixed ones; "ovp8" for 8 bits.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        parameters: float values the codes stand for.
        size_bytes: of codes, scales and codebook as a checkpoint stores them.
        outlier_share: share of pairs that hold an outlier and its victim, 0 to 1.
        plain_share: share of groups without the pair rule, 0 to 1.
        sqnr_db: signal-to-quantization-noise ratio in dB, inf if the codes are exact; None if not known.
        bits: per code.
        activations: how the layer's input is quantized, e.g. "int8 token", "ovp4 flint4 tensor"; None = it is
            not.
        activation_sqnr_db: ratio of the calibration sample in dB; None if there was no sample.
        activation_outlier_share: share of its pairs that hold an outlier and its victim; likewise.
        activation_clipped_share: share of its values beyond the largest level; likewise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    codebook: str
    group_size: int
    parameters: int
    size_bytes: int
    outlier_share: float
    plain_share: float
    sqnr_db: float | None
    bits: int = 4
    activations: str | None = None
    activation_sqnr_db: float | None = None
    activation_outlier_share: float | None = None
    activation_clipped_share: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and codebook included, per float value."""
        return 8 * self.size_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "shape": list(self.shape), "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True, repr=False)
class Report:
    """Figures of a quantized model. Shared tensors count once. `print(report)` shows the table.

    Args:
        model: name of the model's class.
        layers: the quantized weights, in the model's order.
        skipped: every other module with parameters, and the reason why it was left alone.
        quantized_share: share of all parameter values that are quantized, 0 to 1.
        model_bytes: parameters and saved buffers of the whole model as a checkpoint stores them.
        float_bytes: the same if the quantized weights were in the model's float type.
    """

    model: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    quantized_share: float
    model_bytes: int
    float_bytes: int

    @property
    def parameters(self) -> int:
        """Float values that are quantized."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_bytes(self) -> int:
        """Size of the quantized weights."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits per quantized value."""
        return 8 * self.quantized_bytes / self.parameters

    def __repr__(self) -> str:
        return (
            f"Report({self.model}: {len(self.layers)} quantized weights, {self.quantized_share:.1%} of the "
            f"parameters, {self.bits_per_weight:.3f} bits per weight)"
        )

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None, *, every_layer: bool = False) -> str:
        """Plain text for a terminal.

        Args:
            width: in characters; None = the terminal's.
            every_layer: long models show one line for layers whose names differ only in numbers; True shows
                each on a line of its own.

        Raises:
            ValueError: a width that nothing fits into.
        """
        from olive.reports.table import render_table

        return render_table(self, width, every_layer=every_layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: all the fields, and the totals."""
        return {
            "model": self.model,
            "quantized_share": self.quantized_share,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bytes": self.quantized_bytes,
            "model_bytes": self.model_bytes,
            "float_bytes": self.float_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }

    def json(self, indent: int | None = None) -> str:
        """`to_dict` as one JSON object; JSON has no infinity, so a ratio that is not finite becomes null."""
        values = self.to_dict()
        for layer in values["layers"]:
            for key in ("sqnr_db", "activation_sqnr_db"):
                if layer[key] is not None and not math.isfinite(layer[key]):
                    layer[key] = None
        return json.dumps(values, indent=indent, allow_nan=False)

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page; a file that exists is replaced once the page is complete.

        Args:
            path: of the file; its folder has to exist.

        Returns:
            The path.

        Raises:
            RuntimeError: jinja2 is not installed.
            OSError: the file cannot be written.
        """
        from olive.reports.page import write_page

        return write_page(self, Path(path))
