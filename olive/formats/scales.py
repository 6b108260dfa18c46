"""Stored scales: a bfloat16 bit pattern in an int16 whose lowest mantissa bit is the group's rule bit.

Integers on purpose: `model.to(dtype)` converts floating-point tensors only, so it cannot break the rule bits.
A scale therefore has 7 significant bits. Rule bit 0: the pair rule holds in the group; 1: the group is plain.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Groups whose largest magnitude is below this are stored as zeros with scale 1. The search squares weights in
# float32, whose smallest normal number is 2^-126: below 2^-63 sigma would be lost, and with it the scale.
TINY = 2.0**-60
_DROPPED_BITS = 17  # of a float32: 16 that bfloat16 does not have, and the rule bit


def round_scale(scale: Tensor) -> Tensor:
    """Round to the nearest storable scale, ties to even.

    Args:
        scale: float32, any shape, finite.

    Returns:
        float32, same shape; 7 significant bits.
    """
    bits = scale.contiguous().view(torch.int32)
    half_minus_one = (1 << (_DROPPED_BITS - 1)) - 1
    last_kept = (bits >> _DROPPED_BITS) & 1
    return ((bits + half_minus_one + last_kept) & -(1 << _DROPPED_BITS)).view(torch.float32)


def pack_scale(scale: Tensor, plain: Tensor) -> Tensor:
    """Store scales with their rule bits.

    Args:
        scale: float32, any shape; rounded to the nearest storable value.
        plain: bool, same shape; True = no pair rule in this group.

    Returns:
        int16, same shape.
    """
    pattern = round_scale(scale).view(torch.int32) >> 16
    return (pattern | plain.to(torch.int32)).to(torch.int16)


def unpack_scale(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Read stored scales: the inverse of `pack_scale` on storable values.

    Args:
        stored: int16, any shape.

    Returns:
        scale float32 and plain bool, both of the same shape.
    """
    plain = (stored & 1).bool()
    pattern = (stored & -2).to(torch.int32) << 16
    return pattern.view(torch.float32), plain
