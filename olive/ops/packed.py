"""Packed layouts: how backends hold codes and scales, and the shapes that follow, always of 3 dimensions.

A layout is a permutation of the canonical bytes with zeros past the ends; `ovp_pack`, `ovp_unpack` convert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from olive.formats.layout import PER_TENSOR, codes_shape, groups_per_row


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class PackedLayout(ABC):
    """Where the bytes of a weight [N, K] are.

    Attributes:
        name: for errors.
        codes_text: the shape of packed codes, for errors.
    """

    name: str
    codes_text: str

    @abstractmethod
    def codes_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        """Shape of packed codes, uint8."""

    @abstractmethod
    def scale_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        """Shape of packed scales, int16; a per-tensor scale is repeated for every row."""

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """Permute padded codes uint8 [rows, bytes] to the packed shape."""

    @abstractmethod
    def unpack_codes(self, codes: Tensor) -> Tensor:
        """The inverse: padded codes uint8 [rows, bytes]."""

    @abstractmethod
    def pack_scale(self, scale: Tensor) -> Tensor:
        """Permute padded scales int16 [rows, G] to the packed shape."""

    @abstractmethod
    def unpack_scale(self, scale: Tensor) -> Tensor:
        """The inverse: padded scales int16 [rows, G]."""

    def pack(self, codes: Tensor, scale: Tensor, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
        """Canonical codes and scale to packed ones, in PyTorch: the definition."""
        rows = int(codes.shape[0])
        size = (rows, in_features, group_size)
        codes_to, scale_to = self.codes_shape(*size), self.scale_shape(*size)
        groups = int(scale.shape[1])
        padded_rows = scale_to[0] * scale_to[1] * scale_to[2] // groups
        padded = codes.new_zeros(padded_rows, codes_to[0] * codes_to[1] * codes_to[2] // padded_rows)
        padded[:rows, : codes.shape[1]] = codes
        padded_scale = scale.new_zeros(padded_rows, groups)
        padded_scale[:rows] = scale  # a per-tensor scale spreads over the rows
        return self.pack_codes(padded), self.pack_scale(padded_scale)

    def unpack(
        self, codes: Tensor, scale: Tensor, out_features: int, in_features: int, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: canonical codes and scale."""
        rows, columns = codes_shape(out_features, in_features)
        row_scale = self.unpack_scale(scale)[:out_features]
        return (
            self.unpack_codes(codes)[:rows, :columns].contiguous(),
            (row_scale[:1] if group_size == PER_TENSOR else row_scale).contiguous(),
        )


class InterleavedRows(PackedLayout):
    """CPUs: packed codes [b, c, 4 r + j] = codes[16 b + r, 4 c + j], scale [b, g, r] = scale[16 b + r, g].

    A thread reads the weight as one stream, a vector of 64 bytes holds 8 columns of 16 rows, and its low
    nibbles are the even columns, its high nibbles the odd ones. K is padded to whole blocks of columns whose
    products are summed as integers: the group, at most 128.
    """

    name = "interleaved rows"
    codes_text = "[ceil(N / 16), K' / 8, 64]"
    rows = 16  # one 512-bit vector of 32-bit lanes
    columns = 8  # of one lane

    def codes_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        block = 128 if group_size <= 0 else group_size
        steps = _blocks(in_features, block) * (block // self.columns)
        return (_blocks(out_features, self.rows), steps, self.rows * self.columns // 2)

    def scale_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        return (_blocks(out_features, self.rows), groups_per_row(in_features, group_size), self.rows)

    def pack_codes(self, codes: Tensor) -> Tensor:
        lanes = codes.view(-1, self.rows, codes.shape[1] * 2 // self.columns, self.columns // 2)
        return lanes.transpose(1, 2).flatten(2).contiguous()

    def unpack_codes(self, codes: Tensor) -> Tensor:
        lanes: Tensor = codes.unflatten(2, (self.rows, -1))
        return lanes.transpose(1, 2).flatten(2).flatten(0, 1)

    def pack_scale(self, scale: Tensor) -> Tensor:
        return scale.view(-1, self.rows, scale.shape[1]).transpose(1, 2).contiguous()

    def unpack_scale(self, scale: Tensor) -> Tensor:
        return scale.transpose(1, 2).flatten(0, 1)


class Fragments(PackedLayout):
    """NVIDIA GPUs: the order of matrix fragments, `csrc/core/fragments.h`.

    A tile of 16 rows x 64 columns is 512 bytes, 16 for each lane of a warp: byte 16 lane + 4 step + register,
    where lane = 4 (row % 8) + pair % 4, step = pair // 8, register = row // 8 + 2 (pair // 4 % 2) and
    pair = column // 2. Packed scale element 2 r + h of a tile is row 8 h + r. N and K are padded to 64.
    """

    name = "fragments"
    codes_text = "[4 ceil(N / 64), ceil(K / 64), 512]"

    def codes_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        return (4 * _blocks(out_features, 64), _blocks(in_features, 64), 512)

    def scale_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int, int]:
        return (4 * _blocks(out_features, 64), groups_per_row(in_features, group_size), 16)

    def pack_codes(self, codes: Tensor) -> Tensor:
        # [tile, row / 8, row % 8, column tile, step, pair / 4 % 2, pair % 4]
        parts = codes.view(-1, 2, 8, codes.shape[1] // 32, 4, 2, 4)
        return parts.permute(0, 3, 2, 6, 4, 5, 1).flatten(2).contiguous()

    def unpack_codes(self, codes: Tensor) -> Tensor:
        parts: Tensor = codes.unflatten(2, (8, 4, 4, 2, 2))
        return parts.permute(0, 6, 2, 1, 4, 5, 3).flatten(3).flatten(0, 2)

    def pack_scale(self, scale: Tensor) -> Tensor:
        return scale.view(-1, 2, 8, scale.shape[1]).permute(0, 3, 2, 1).flatten(2).contiguous()

    def unpack_scale(self, scale: Tensor) -> Tensor:
        parts: Tensor = scale.unflatten(2, (8, 2))
        return parts.permute(0, 3, 2, 1).flatten(0, 2)


CPU_LAYOUT = InterleavedRows()
CUDA_LAYOUT = Fragments()


def packed_layout(device: torch.device) -> PackedLayout:
    """The layout that three dimensions mean on a device."""
    return CUDA_LAYOUT if device.type == "cuda" else CPU_LAYOUT
