"""Activations as integers: which formats there are, and how their scales are found while a model runs.

Scales are static (one per tensor, from calibration) or dynamic: one per token, or one per token and group of
columns, found in the values themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from olive.formats.codebooks import CODEBOOK_NAMES, LEARNED
from olive.formats.layout import PER_TENSOR, check_group_size
from olive.formats.ovp4 import PAIRINGS, Pairing

ACTIVATION_FORMATS = ("int8", "ovp4", "ovp8")
PAPER = "paper"  # int4 or flint4, whichever loses less on a tensor: OliVe's adaptive type
ACTIVATION_CODEBOOKS = (*(name for name in CODEBOOK_NAMES if name != LEARNED), PAPER)

# Dynamic scales, in the terms of `ovp_quantize` and `ovp8_quantize`. Few, because each costs a pass over
# values that lie in registers. Per token, on activations of the bundled model and MiniLM, they lose about
# 13 % more squared error than the long grids that weights are searched with; with 50-fold outliers up to
# 2.4 times.
DYNAMIC_PAIR_GRID = (0.35, 0.5, 0.7, 1.0, 1.4)
DYNAMIC_PLAIN_GRID = (0.7, 0.85, 1.0)
DYNAMIC_OVP8_GRID = (1.0, 2.0, 4.0, 8.0)
# By format, as operators take them: multiples of the pair rule (8 bits have no other), of the plain rule.
DYNAMIC_GRIDS: dict[str, tuple[list[float], list[float]]] = {
    "int8": ([], []),
    "ovp4": (list(DYNAMIC_PAIR_GRID), list(DYNAMIC_PLAIN_GRID)),
    "ovp8": (list(DYNAMIC_OVP8_GRID), []),
}

# Sums of products of two int8 levels stay within an int32 up to this many: 127^2 x 133144 < 2^31.
MAX_INT32_TERMS = (2**31 - 1) // 127**2


@dataclass(frozen=True)
class ActivationFormat:
    """How one layer's input becomes integers.

    Args:
        name: "int8": symmetric, -127..127; "ovp4", "ovp8": outlier-victim pairs of 4 and 8 bits.
        group_size: columns that share a scale: 32, 64, 128; -1 per token, 0 per tensor (static).
        codebook: of "ovp4".
        pairing: which values of a pair become outliers, see `PairTables.encode_pair_rule`.

    Raises:
        ValueError: a value out of its set.
        TypeError: a group size that is no int.
    """

    name: str
    group_size: int = -1
    codebook: str = "int4"
    pairing: Pairing = "optimal"

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("activations", self.name, ACTIVATION_FORMATS),
            ("activation_codebook", self.codebook, ACTIVATION_CODEBOOKS),
            ("pairing", self.pairing, PAIRINGS),
        ):
            if value not in allowed:
                choices = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"{field}: expected one of {choices}, got {value!r}")
        check_group_size(self.group_size, "activation_group_size")

    @property
    def is_static(self) -> bool:
        """Whether the scale comes from calibration."""
        return self.group_size == PER_TENSOR


def integer_block(in_features: int, group_size: int, activation_group_size: int) -> int:
    """Columns whose integer products are summed before scales apply: those of the smaller group, else K."""
    groups = [size for size in (group_size, activation_group_size) if size > 0]
    return min(groups) if groups else in_features
