"""Codebooks of the 4-bit outlier-victim pair format: three small tables of integer levels.

`normal` and `outlier` are magnitudes indexed by the low three bits of a nibble (bit 3 is the sign); `plain`
are signed levels indexed by the whole nibble, used by groups whose rule bit is set. Stored as int8 [32]:
normal (8), outlier (8, to be read as unsigned bytes), plain (16, all zero when the codebook has no plain
rule).

Source: `int4` and `flint4` with their outliers are OliVe's, arXiv:2304.07493, section 3.3; `nf4` follows the
quantiles of NF4 (QLoRA, arXiv:2305.14314) rounded to int8; the plain rule is this project's own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

IDENTIFIER = 8  # minus zero: this value is a victim, its partner an outlier
NO_PLAIN = (0,) * 16
NF4_PLAIN = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


def _rising(levels: tuple[int, ...]) -> bool:
    return all(low < high for low, high in itertools.pairwise(levels))


@dataclass(frozen=True)
class Codebook:
    """Levels of one 4-bit outlier-victim pair codebook, in units of the group's scale.

    Args:
        normal: 8 magnitudes, normal[0] = 0, rising, at most 255.
        outlier: 8 magnitudes, outlier[0] = 0, rising, outlier[1] > normal[7], at most 255.
        plain: 16 rising signed int8 levels that hold 0, or 16 zeros for "no plain rule".

    Raises:
        ValueError: a table has the wrong length, order or range.
    """

    name: str
    normal: tuple[int, ...]
    outlier: tuple[int, ...]
    plain: tuple[int, ...] = NO_PLAIN

    def __post_init__(self) -> None:
        for table, levels in (("normal", self.normal), ("outlier", self.outlier)):
            if len(levels) != 8 or levels[0] != 0 or not _rising(levels) or levels[-1] > 255:
                raise ValueError(
                    f"codebook {self.name!r}, {table}: expected 8 rising magnitudes from 0 to at most 255, "
                    f"got {levels}"
                )
        if self.outlier[1] <= self.normal[7]:
            raise ValueError(
                f"codebook {self.name!r}, outlier: expected every outlier above the largest normal "
                f"{self.normal[7]}, got {self.outlier[1]}"
            )
        if self.has_plain and (
            len(self.plain) != 16
            or not _rising(self.plain)
            or 0 not in self.plain
            or not -128 < self.plain[0] <= self.plain[-1] < 128
        ):
            raise ValueError(
                f"codebook {self.name!r}, plain: expected 16 rising levels within -127..127 that hold 0, "
                f"got {self.plain}"
            )

    @property
    def has_plain(self) -> bool:
        """Whether groups may drop the pair rule (rule bit 1)."""
        return self.plain != NO_PLAIN

    @property
    def is_int8(self) -> bool:
        """Whether every level is an int8, so that integer matrix units compute with it exactly."""
        return self.outlier[7] <= 127

    def tensor(self) -> Tensor:
        """The stored form: int8 [32] = normal (8), outlier (8), plain (16); magnitudes are unsigned bytes."""
        tables = self.normal + self.outlier + tuple(level & 0xFF for level in self.plain)
        return torch.tensor(tables, dtype=torch.uint8).view(torch.int8)

    @classmethod
    def from_tensor(cls, stored: Tensor, name: str = "codebook") -> Codebook:
        """Read the stored form back.

        Args:
            stored: int8 [32].
            name: what to call it in errors, e.g. the tensor's full name in a checkpoint.

        Raises:
            TypeError: not int8.
            ValueError: not 32 values, or not a codebook.
        """
        if stored.dtype != torch.int8:
            raise TypeError(f"{name}: expected int8, got {stored.dtype}")
        if stored.shape != (32,):
            raise ValueError(f"{name}: expected shape (32,), got {tuple(stored.shape)}")
        stored = stored.detach().cpu()
        magnitudes = stored[:16].view(torch.uint8).tolist()
        return cls(name, tuple(magnitudes[:8]), tuple(magnitudes[8:]), tuple(stored[16:].tolist()))


_NF4_NORMAL = (0, 4, 8, 12, 17, 23, 31, 42)
_NF4_OUTLIER = (0, 55, 64, 74, 85, 97, 111, 127)

CODEBOOKS = {
    book.name: book
    for book in (
        Codebook("int4", (0, 1, 2, 3, 4, 5, 6, 7), (0, 12, 16, 24, 32, 48, 64, 96)),
        Codebook("flint4", (0, 1, 2, 3, 4, 6, 8, 16), (0, 24, 32, 48, 64, 96, 128, 192)),
        Codebook("nf4", _NF4_NORMAL, _NF4_OUTLIER),
        Codebook("adaptive", _NF4_NORMAL, _NF4_OUTLIER, NF4_PLAIN),
    )
}
LEARNED = "learned"  # fitted to each tensor by olive.ptq; its tables are stored with the tensor
CODEBOOK_NAMES = (*CODEBOOKS, LEARNED)


def get_codebook(name: str) -> Codebook:
    """Return a fixed codebook by name.

    Raises:
        ValueError: unknown name, or "learned", whose tables depend on the tensor.
    """
    if name not in CODEBOOKS:
        raise ValueError(f"codebook: expected one of {', '.join(CODEBOOKS)}, got {name!r}")
    return CODEBOOKS[name]
