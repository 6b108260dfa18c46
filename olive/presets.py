"""Configurations with a name: the recipes of OliVe's paper (ISCA 2023, arXiv:2304.07493).

One scale per output channel of a weight and one static scale per activation tensor, found by the paper's
search (multiples 0.75 to 2.5 of 3 sigma, section 3.4) with the paper's pair rule; the output head stays as it
is. Static scales need data: `olive.quantize(model, olive.presets.paper_w4a4(), calibration=...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import olive` reads this file, and must not import torch
    from olive.config import QuantConfig

__all__ = ["paper_w4a4", "paper_w8a8"]


def paper_w4a4() -> QuantConfig:
    """4-bit weights and activations: int4 or flint4 per tensor, whichever has the least squared error."""
    from olive.config import QuantConfig

    return QuantConfig(
        bits=4,
        codebook="paper",
        group_size=-1,
        activations="ovp4",
        method="paper",
        activation_group_size=0,
        activation_codebook="paper",
    )


def paper_w8a8() -> QuantConfig:
    """8-bit weights and activations: int8 with abfloat outliers."""
    from olive.config import QuantConfig

    return QuantConfig(bits=8, group_size=-1, activations="ovp8", method="paper", activation_group_size=0)
