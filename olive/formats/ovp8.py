"""Eight-bit outlier-victim pairs: a byte per value, two neighbours along K form a pair.

Normal: int8, -127..127. Identifier: 0x80, the value is a victim and decodes as 0, its partner is an outlier.
Outlier: sign bit, then abfloat E4M3 with bias 4: magnitude (8 + mantissa) << (exponent + 4), from 144 to
    32768.
The bound 2^15 is the paper's, so that a product of two outliers fits an int32. Codes 0x00 and 0x80 are no
outliers. Scales are stored as in the 4-bit format, with rule bit 0.

Source: OliVe, arXiv:2304.07493, section 3.3. The released research code uses E2M5; this follows the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.layout import codes_shape, expand_scale, pad_columns, scale_shape
from olive.formats.ovp4 import Pairing, _nearest
from olive.formats.scales import unpack_scale

IDENTIFIER8 = 0x80
MAX_OUTLIER_CODE = 0x40  # exponent 8, mantissa 0: 32768


def abfloat_magnitude(code: Tensor) -> Tensor:
    """Magnitude of abfloat E4M3 codes 0..127 (sign removed): int32, same shape; code 0 is 0."""
    code = code.to(torch.int32)
    magnitude = (8 + (code & 7)) << ((code >> 3) + 4)
    return torch.where(code == 0, 0, magnitude)


def _outlier_levels(device: torch.device) -> Tensor:
    return abfloat_magnitude(torch.arange(1, MAX_OUTLIER_CODE + 1, device=device)).float()


def encode_pairs8(t: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Encode values in units of the scale, and say what it costs.

    float32 arithmetic in this order on every backend, as in `PairTables`: error = (t - level)^2, pair error =
    even error + odd error. Normals round to nearest, ties to even; between outliers ties go to the lower one.

    Args:
        t: float32 [..., 2 P], values in units of the scale.
        pairing: "optimal": least squared error of the three candidates, ties to the earlier; "paper": the
            larger value past the normal range takes the pair.

    Returns:
        codes uint8 [..., 2 P] and the pair errors float32 [..., P] in squared units of the scale.
    """
    magnitude = t.abs()
    levels = _outlier_levels(t.device)
    normal = torch.clamp(torch.round(t), -127, 127)
    outlier_index = _nearest(magnitude, levels)
    as_normal = (t - normal) ** 2
    as_outlier = (magnitude - levels[outlier_index]) ** 2
    as_victim = magnitude**2
    normal_normal = as_normal[..., 0::2] + as_normal[..., 1::2]
    outlier_victim = as_outlier[..., 0::2] + as_victim[..., 1::2]
    victim_outlier = as_victim[..., 0::2] + as_outlier[..., 1::2]
    if pairing == "optimal":
        even_out = (outlier_victim < normal_normal) & (outlier_victim <= victim_outlier)
        odd_out = (victim_outlier < normal_normal) & ~even_out
    else:
        past = magnitude > (127.0 + levels[0]) * 0.5
        even_out = past[..., 0::2] & (~past[..., 1::2] | (magnitude[..., 0::2] >= magnitude[..., 1::2]))
        odd_out = past[..., 1::2] & ~even_out
    normal_code = normal.to(torch.int8).view(torch.uint8)
    outlier_code = (outlier_index + 1).to(torch.uint8) | ((t < 0).to(torch.uint8) << 7)
    low = torch.where(even_out, outlier_code[..., 0::2], normal_code[..., 0::2])
    high = torch.where(odd_out, outlier_code[..., 1::2], normal_code[..., 1::2])
    low = torch.where(odd_out, IDENTIFIER8, low).to(torch.uint8)
    high = torch.where(even_out, IDENTIFIER8, high).to(torch.uint8)
    error = torch.where(even_out, outlier_victim, torch.where(odd_out, victim_outlier, normal_normal))
    return torch.stack((low, high), dim=-1).flatten(-2), error


def ovp8_encode(weight: Tensor, scale: Tensor, group_size: int, pairing: Pairing = "optimal") -> Tensor:
    """Encode a weight with 8-bit outlier-victim pairs.

    Args:
        weight: float, [N, K], finite. An odd K is padded with one zero column.
        scale: int16 bit patterns, rule bit 0, `scale_shape(N, K, group_size)`.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: see `encode_pairs8`.

    Returns:
        uint8 [N, 2 ceil(K / 2)].
    """
    rows, columns = weight.shape
    value, _ = unpack_scale(expand_scale(scale, rows, columns, group_size))
    return encode_pairs8(pad_columns(weight.float(), 2) * (1.0 / value), pairing)[0]


def ovp8_decode_levels(codes: Tensor) -> Tensor:
    """Integer levels of 8-bit codes.

    Args:
        codes: uint8 [..., 2 P].

    Returns:
        int32 [..., 2 P], within -32768..32768; exact in bfloat16, not in int8. Two victims, and a victim
        beside 0x00, decode as (0, 0); outlier codes above 0x40, invalid too, are clipped at 2^15.
    """
    pairs = codes.unflatten(-1, (-1, 2))
    partner = pairs.flip(-1)
    normal = torch.where(pairs == IDENTIFIER8, 0, pairs.view(torch.int8).to(torch.int32))
    magnitude = torch.clamp(abfloat_magnitude(pairs & 0x7F), max=1 << 15)
    outlier = torch.where(pairs >= IDENTIFIER8, -magnitude, magnitude)
    return torch.where(partner == IDENTIFIER8, outlier, normal).flatten(-2)


def ovp8_decode(codes: Tensor, scale: Tensor, in_features: int, group_size: int) -> Tensor:
    """Decode 8-bit codes to scale x level in float32 (exact: 7 significant bits times at most 7).

    Args:
        codes: uint8 [N, 2 ceil(K / 2)].
        scale: int16 bit patterns, `scale_shape(N, K, group_size)`.

    Returns:
        float32 [N, K].
    """
    value, _ = unpack_scale(expand_scale(scale, codes.shape[0], in_features, group_size))
    return (ovp8_decode_levels(codes) * value)[:, :in_features]


def ovp8_validate(
    codes: Tensor,
    scale: Tensor,
    *,
    out_features: int,
    in_features: int,
    group_size: int,
    name: str = "weight",
) -> None:
    """Check that stored tensors are a weight of this format.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a wrong shape, a scale that is not positive and finite, or an invalid pair: two victims, a
            victim beside code 0x00 (no outlier), or an outlier above 2^15.
    """
    expected = {
        "codes": (codes, torch.uint8, codes_shape(out_features, in_features, bits=8)),
        "scale": (scale, torch.int16, scale_shape(out_features, in_features, group_size)),
    }
    for field, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{field}: expected {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {tuple(tensor.shape)}")
    value, plain = unpack_scale(scale)
    if not bool((torch.isfinite(value) & (value > 0) & ~plain).all()):
        raise ValueError(f"{name}.scale: expected positive finite scales without rule bits")
    pairs = codes.unflatten(-1, (-1, 2))
    victim, partner = pairs == IDENTIFIER8, pairs.flip(-1)
    bad_partner = (partner & 0x7F == 0) | ((partner & 0x7F) > MAX_OUTLIER_CODE)
    invalid = (victim & bad_partner).any(-1)
    if invalid.any():
        row, pair = invalid.nonzero()[0].tolist()
        low, high = (int(byte) for byte in pairs[row, pair])
        raise ValueError(
            f"{name}.codes: expected valid outlier-victim pairs, got bytes 0x{low:02x} 0x{high:02x} "
            f"at [{row}, {2 * pair}]"
        )


def outlier_pairs8(codes: Tensor) -> Tensor:
    """Which pairs hold an outlier and its victim: bool [..., P] for codes uint8 [..., 2 P]."""
    found: Tensor = (codes.unflatten(-1, (-1, 2)) == IDENTIFIER8).any(-1)
    return found
