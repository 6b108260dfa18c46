"""Weights on a uniform grid: integer codes, packed along K, and float32 step sizes. The definition.

A code c of b bits, 0 .. 2^b - 1, stands for scale * level, with two kinds of grid:

    mid-rise (StatsQ):  level = c - (2^b - 1) / 2, odd multiples of half a step
    mid-tread (LSQ):    level = c - 2^(b - 1), whole steps

Twice a level is the integer 2 c - z, with z = 2^b - 1 or 2^b. So sums of products with integers are exact.

Packed codes are uint8 [N, ceil(K w / 8)] with w = 2, 4 or 8 bits of storage per code. Column k has the bits
from (k w) mod 8 on of byte k w // 8: the even column of 4 bits is the low nibble. Bits past K are zero.
Scales are float32 [N, G], the step size of each group of columns; G = 1, or ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.layout import PER_CHANNEL, groups_per_row, pad_columns

MAX_BITS = 8


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if codes may have so many.

    Raises:
        ValueError: not 1 to 8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name}: expected 1 to {MAX_BITS}, got {bits}")
    return bits


def check_uniform_group_size(group_size: int) -> int:
    """Return `group_size` if a row can be cut into such groups.

    Raises:
        ValueError: neither -1 (per channel) nor at least 1.
    """
    if group_size != PER_CHANNEL and group_size < 1:
        raise ValueError(f"group_size: expected {PER_CHANNEL} per channel, or columns, got {group_size}")
    return group_size


def storage_bits(bits: int) -> int:
    """Bits that a code takes in memory: 2, 4 or 8.

    Raises:
        ValueError: bits are not 1 to 8.
    """
    return 2 if check_bits(bits) <= 2 else 4 if bits <= 4 else 8


def doubled_zero(bits: int, mid_rise: bool) -> int:
    """z: twice a level is 2 c - z."""
    return (1 << bits) - 1 if mid_rise else 1 << bits


def uniform_codes_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int]:
    """Shape of the packed codes of a weight [N, K]: uint8 [N, ceil(K w / 8)]."""
    return (out_features, -(-in_features * storage_bits(bits) // 8))


def uniform_scale_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]: float32 [N, G]."""
    return (out_features, groups_per_row(in_features, check_uniform_group_size(group_size)))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along K.

    Args:
        codes: uint8 [N, K], 0 .. 2^bits - 1.
        bits: 1 to 8.

    Returns:
        uint8 [N, ceil(K w / 8)], lowest bits first.

    Raises:
        TypeError: codes are not uint8.
        ValueError: not of two dimensions, bits out of range, or a code of more bits.
    """
    width = storage_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected torch.uint8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape [N, K], got {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: expected 0 to {2**bits - 1} for {bits} bits, got {int(codes.max())}")
    per_byte = 8 // width
    fields = pad_columns(codes, per_byte).unflatten(1, (-1, per_byte))
    packed = torch.zeros(fields.shape[:-1], dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        packed |= fields[..., place] << (place * width)
    return packed


def unpack_codes(packed: Tensor, in_features: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: uint8 [N, ceil(K w / 8)].
        in_features: K; what lies past it is dropped.
        bits: 1 to 8.

    Returns:
        uint8 [N, K].

    Raises:
        TypeError: codes are not uint8.
        ValueError: another shape, or bits out of range.
    """
    width = storage_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"codes: expected torch.uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] != uniform_codes_shape(1, in_features, bits)[1]:
        wanted = f"[N, {uniform_codes_shape(1, in_features, bits)[1]}]"
        raise ValueError(f"codes: expected shape {wanted}, got {tuple(packed.shape)}")
    fields = [(packed >> place) & (2**width - 1) for place in range(0, 8, width)]
    return torch.stack(fields, dim=-1).flatten(1)[:, :in_features].contiguous()


def expand_uniform_scale(scale: Tensor, in_features: int, group_size: int) -> Tensor:
    """One scale per column: [N, G] to [N, K]."""
    if scale.shape[1] == 1:
        return scale.expand(scale.shape[0], in_features)
    return scale.repeat_interleave(group_size, dim=1)[:, :in_features]


def uniform_decode_values(
    packed: Tensor, scale: Tensor, in_features: int, bits: int, mid_rise: bool, group_size: int
) -> Tensor:
    """Decode packed codes: level times scale, rounded once.

    Args:
        packed: uint8 [N, ceil(K w / 8)].
        scale: float32 [N, G].
        in_features: K.
        bits, mid_rise: the grid.
        group_size: -1 per channel, else columns per group.

    Returns:
        float32 [N, K].
    """
    doubled = 2 * unpack_codes(packed, in_features, bits).float() - doubled_zero(bits, mid_rise)
    return doubled * 0.5 * expand_uniform_scale(scale, in_features, group_size)


def uniform_validate(
    codes: Tensor,
    scale: Tensor,
    *,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    name: str = "weight",
) -> None:
    """Check that stored tensors are a weight of this format.

    Args:
        codes: uint8 [N, ceil(K w / 8)].
        scale: float32 [N, G].
        name: prefix of the tensors' names in errors.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a wrong shape, a negative or infinite scale or NaN, a code of more bits, or bits past K.
    """
    expected = {
        "codes": (codes, torch.uint8, uniform_codes_shape(out_features, in_features, bits)),
        "scale": (scale, torch.float32, uniform_scale_shape(out_features, in_features, group_size)),
    }
    for field, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{field}: expected {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {tuple(tensor.shape)}")
    bad = ~(torch.isfinite(scale) & (scale >= 0))
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.scale: expected finite scales of at least 0, got {scale[row, group].item()} "
            f"at [{row}, {group}]"
        )
    width = storage_bits(bits)
    unused = sum((2**width - 2**bits) << place for place in range(0, 8, width))
    invalid = (codes & unused) != 0
    if tail := in_features * width % 8:
        invalid[:, -1] |= codes[:, -1] >> tail != 0
    if invalid.any():
        row, byte = invalid.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.codes: expected codes of {bits} bits and zeros past K, got byte "
            f"0x{int(codes[row, byte]):02x} at [{row}, {byte}]"
        )
