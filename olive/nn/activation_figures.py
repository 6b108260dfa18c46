"""`ActivationFigures`: how well a calibration sample of a layer's input survives its quantization."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ActivationFigures:
    """Measured on the rows that calibration kept of one layer's input.

    Args:
        sqnr_db: signal-to-quantization-noise ratio in dB, inf if nothing was lost; None if not known.
        outlier_share: share of pairs that hold an outlier and its victim, 0 to 1; 0 for "int8".
        clipped_share: share of values beyond the largest level by more than half its distance to the next.
    """

    sqnr_db: float | None
    outlier_share: float
    clipped_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
