"""Four-bit outlier-victim pairs: encode with a given scale, decode, validate. Plain PyTorch, the definition.

Columns (2j, 2j+1) form a pair and share byte j: even column in the low nibble, odd column in the high nibble.
Source: OliVe, arXiv:2304.07493, section 3; departures are named where they happen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from olive.formats.codebooks import IDENTIFIER, Codebook
from olive.formats.layout import codes_shape, expand_scale, pad_columns, scale_shape
from olive.formats.scales import unpack_scale

Pairing = Literal["optimal", "paper"]
PAIRINGS: tuple[Pairing, ...] = ("optimal", "paper")
INVALID_PAIRS = (0x88, 0x08, 0x80)


def _midpoints(levels: Tensor) -> Tensor:
    """Thresholds between neighbours; a value on a threshold takes the lower level."""
    return (levels[:-1] + levels[1:]) * 0.5


def _nearest(value: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of the rising `levels`; ties go to the lower one."""
    return torch.bucketize(value.contiguous(), _midpoints(levels))


class PairTables:
    """A codebook as float32 tensors on one device, with the encoder's per-pair choice.

    The arithmetic is float32 and in this order on every backend, so that all of them make the same choices:
    t = w * (1 / scale), error = (t - level)^2, pair error = even error + odd error.
    """

    def __init__(self, codebook: Codebook, device: torch.device):
        def table(levels: tuple[int, ...]) -> Tensor:
            return torch.tensor(levels, dtype=torch.float32, device=device)

        self.codebook = codebook
        self.normal = table(codebook.normal)
        self.outlier = table(codebook.outlier)
        self.plain = table(codebook.plain)

    def encode_pair_rule(
        self, t: Tensor, pairing: Pairing, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode under the pair rule.

        Args:
            t: float32 [..., 2 P], values in units of the scale.
            pairing: "optimal" takes the least squared error of (normal, normal), (outlier, victim),
                (victim, outlier), ties to the earlier; "paper" gives the pair to the value past the
                normal range, to the larger one if both are. (Algorithm 1 of the paper compares signed
                values, an obvious slip; its released code keeps the left one.)
            importance: float32, broadcastable to t, >= 0; weighs the squared errors.

        Returns:
            codes uint8 [..., P] and the pair errors float32 [..., P] in squared units of the scale.
        """
        magnitude = t.abs()
        normal_index = _nearest(magnitude, self.normal)
        outlier_index = 1 + _nearest(magnitude, self.outlier[1:])

        def error(level: Tensor) -> Tensor:
            squared = (magnitude - level) ** 2
            return squared if importance is None else squared * importance

        as_normal, as_outlier = error(self.normal[normal_index]), error(self.outlier[outlier_index])
        as_victim = error(torch.zeros((), device=t.device))
        normal_normal = as_normal[..., 0::2] + as_normal[..., 1::2]
        outlier_victim = as_outlier[..., 0::2] + as_victim[..., 1::2]
        victim_outlier = as_victim[..., 0::2] + as_outlier[..., 1::2]
        if pairing == "optimal":
            even_out = (outlier_victim < normal_normal) & (outlier_victim <= victim_outlier)
            odd_out = (victim_outlier < normal_normal) & ~even_out
        else:
            past = magnitude > (self.normal[7] + self.outlier[1]) * 0.5
            even, odd = past[..., 0::2], past[..., 1::2]
            even_larger = magnitude[..., 0::2] >= magnitude[..., 1::2]
            even_out = even & (~odd | even_larger)
            odd_out = odd & ~even_out

        sign = (t < 0).to(torch.uint8) << 3
        normal_code = torch.where(normal_index == 0, 0, normal_index.to(torch.uint8) | sign)
        outlier_code = outlier_index.to(torch.uint8) | sign
        low = torch.where(even_out, outlier_code[..., 0::2], normal_code[..., 0::2])
        high = torch.where(odd_out, outlier_code[..., 1::2], normal_code[..., 1::2])
        low = torch.where(odd_out, IDENTIFIER, low).to(torch.uint8)
        high = torch.where(even_out, IDENTIFIER, high).to(torch.uint8)
        pair_error = torch.where(
            even_out, outlier_victim, torch.where(odd_out, victim_outlier, normal_normal)
        )
        return low | (high << 4), pair_error

    def encode_plain(self, t: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode without the pair rule; arguments and results as in `encode_pair_rule`."""
        index = _nearest(t, self.plain)
        squared = (t - self.plain[index]) ** 2
        if importance is not None:
            squared = squared * importance
        code = index.to(torch.uint8)
        return code[..., 0::2] | (code[..., 1::2] << 4), squared[..., 0::2] + squared[..., 1::2]


def level_tables(codebook: Codebook, device: torch.device | str = "cpu") -> Tensor:
    """Signed levels by nibble: int16 [3, 16] = normal, outlier, plain; nibble 8 of the first two is 0."""

    def signed(magnitudes: tuple[int, ...]) -> list[int]:
        return [*magnitudes, *(-m for m in magnitudes)]

    tables = [signed(codebook.normal), signed(codebook.outlier), list(codebook.plain)]
    return torch.tensor(tables, dtype=torch.int16, device=device)


def ovp4_encode(
    weight: Tensor,
    scale: Tensor,
    codebook: Codebook,
    group_size: int,
    pairing: Pairing = "optimal",
    importance: Tensor | None = None,
) -> Tensor:
    """Encode a weight with outlier-victim pairs, scales and rule bits given.

    Args:
        weight: float, [N, K], finite. An odd K is padded with one zero column.
        scale: int16 bit patterns with rule bits (`olive.formats.scales`), `scale_shape(N, K, group_size)`.
        codebook: levels in units of the scale.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        pairing: see `PairTables.encode_pair_rule`.
        importance: float32 [K], >= 0, weighs the squared error of each column; None = all alike.

    Returns:
        uint8 [N, ceil(K / 2)]; the even column is the low nibble.
    """
    rows, columns = weight.shape
    value, plain = unpack_scale(expand_scale(scale, rows, columns, group_size))
    t = pad_columns(weight.float(), 2) * (1.0 / value)
    tables = PairTables(codebook, weight.device)
    weights = None if importance is None else pad_columns(importance[None], 2)
    codes, _ = tables.encode_pair_rule(t, pairing, weights)
    if codebook.has_plain:
        codes = torch.where(plain[:, 0::2], tables.encode_plain(t)[0], codes)
    return codes


def ovp4_decode_levels(codes: Tensor, plain: Tensor, codebook: Codebook) -> Tensor:
    """Integer levels of packed codes.

    Args:
        codes: uint8 [..., P].
        plain: bool, broadcastable to codes; True where the group has no pair rule.
        codebook: the tables.

    Returns:
        int16 [..., 2 P], within -255..255; int8-exact codebooks stay within -127..127.
    """
    normal, outlier, levels = level_tables(codebook, codes.device)
    low, high = (codes & 0x0F).long(), (codes >> 4).long()
    even = torch.where(high == IDENTIFIER, outlier[low], normal[low])
    odd = torch.where(low == IDENTIFIER, outlier[high], normal[high])
    even, odd = torch.where(plain, levels[low], even), torch.where(plain, levels[high], odd)
    return torch.stack((even, odd), dim=-1).flatten(-2)


def ovp4_decode(
    codes: Tensor, scale: Tensor, codebook: Codebook, in_features: int, group_size: int
) -> Tensor:
    """Decode packed codes to scale x level, exact in float32 (7 significant bits times at most 8).

    Args:
        codes: uint8 [N, ceil(K / 2)].
        scale: int16 bit patterns, `scale_shape(N, K, group_size)`.
        in_features: K; the pad column of an odd K is dropped.

    Returns:
        float32 [N, K].
    """
    value, plain = unpack_scale(expand_scale(scale, codes.shape[0], in_features, group_size))
    levels = ovp4_decode_levels(codes, plain[:, 0::2], codebook)
    return (levels * value)[:, :in_features]


def outlier_pairs(codes: Tensor, plain: Tensor) -> Tensor:
    """Which pairs hold an outlier and its victim: bool, shape of codes."""
    return (((codes & 0x0F) == IDENTIFIER) | ((codes >> 4) == IDENTIFIER)) & ~plain


def ovp4_validate(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    *,
    out_features: int,
    in_features: int,
    group_size: int,
    name: str = "weight",
) -> Codebook:
    """Check that stored tensors are a weight of this format.

    Args:
        codes: uint8 [N, ceil(K / 2)].
        scale: int16, `scale_shape(N, K, group_size)`.
        codebook: int8 [32].
        name: prefix of the tensors' names in errors.

    Returns:
        The codebook.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a wrong shape, an invalid pair byte, a scale that is zero, not finite, or negative under
            the pair rule, a rule bit without a plain table, or no codebook.
    """
    expected = {
        "codes": (codes, torch.uint8, codes_shape(out_features, in_features)),
        "scale": (scale, torch.int16, scale_shape(out_features, in_features, group_size)),
    }
    for field, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{field}: expected {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {tuple(tensor.shape)}")
    book = Codebook.from_tensor(codebook, f"{name}.codebook")
    value, plain = unpack_scale(scale)
    bad_scale = ~torch.isfinite(value) | (value == 0) | ((value < 0) & ~plain)
    if bad_scale.any():
        row, group = bad_scale.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.scale: expected finite non-zero scales, positive under the pair rule, "
            f"got {value[row, group].item()} at [{row}, {group}]"
        )
    if plain.any() and not book.has_plain:
        row, group = plain.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.scale: expected no rule bit, because {name}.codebook has no plain table, "
            f"got one at [{row}, {group}]"
        )
    invalid = torch.zeros_like(codes, dtype=torch.bool)
    for byte in INVALID_PAIRS:
        invalid |= codes == byte
    invalid &= ~expand_scale(plain, out_features, in_features, group_size)[:, 0::2]
    if invalid.any():
        row, pair = invalid.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.codes: expected valid outlier-victim pairs, got byte 0x{int(codes[row, pair]):02x} "
            f"at [{row}, {pair}]"
        )
    return book
