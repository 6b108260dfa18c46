"""A second implementation of the format in plain NumPy, written from docs/format.md alone.

It shares no code and no method with the package: nearest levels are found by comparing distances in float64
(exact here) instead of thresholds, decoding is a table of 256 bytes built from the page's prose, groups are
visited one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Array = NDArray[np.generic]


@dataclass(frozen=True)
class Tables:
    """Section 2: the three tables, read from the 32 stored bytes."""

    normal: Array
    outlier: Array
    plain: Array

    @classmethod
    def from_bytes(cls, stored: bytes) -> Tables:
        unsigned = np.frombuffer(stored, dtype=np.uint8)
        signed = np.frombuffer(stored, dtype=np.int8)
        return cls(unsigned[0:8].astype(int), unsigned[8:16].astype(int), signed[16:32].astype(int))

    @property
    def has_plain(self) -> bool:
        return bool(self.plain.any())


# Section 3


def group_columns(columns: int, group_size: int) -> list[slice]:
    """The columns of each group of a row."""
    if group_size <= 0:
        return [slice(0, columns)]
    return [slice(start, min(start + group_size, columns)) for start in range(0, columns, group_size)]


# Section 4


def read_scale(pattern: int) -> tuple[np.float32, bool]:
    bits = (int(pattern) & 0xFFFE) << 16
    return np.array([bits], dtype=np.uint32).view(F32)[0], bool(int(pattern) & 1)


def round_to_storable(scale: np.float32) -> np.float32:
    bits = int(np.array([scale], dtype=F32).view(np.uint32)[0])
    bits = (bits + 0xFFFF + ((bits >> 17) & 1)) & 0xFFFE0000
    return np.array([bits], dtype=np.uint32).view(F32)[0]


def write_scale(scale: np.float32, plain: bool) -> np.int16:
    upper = int(np.array([round_to_storable(scale)], dtype=F32).view(np.uint32)[0]) >> 16
    return np.array([upper | plain], dtype=np.uint16).view(np.int16)[0]


# Sections 1 and 5


def _meaning(tables: Tables, byte: int) -> tuple[int, int]:
    """Levels of one byte under the pair rule."""
    nibbles = (byte & 15, byte >> 4)
    levels = []
    for this, partner in (nibbles, nibbles[::-1]):
        if this == 8:
            levels.append(0)
            continue
        table = tables.outlier if partner == 8 else tables.normal
        levels.append(int(table[this & 7]) * (-1 if this & 8 else 1))
    return levels[0], levels[1]


def decode(codes: Array, scale: Array, stored: bytes, columns: int, group_size: int) -> Array:
    """codes uint8 [N, P], scale int16 [rows, G] -> float32 [N, K]."""
    tables = Tables.from_bytes(stored)
    pair_table = np.array([_meaning(tables, byte) for byte in range(256)])
    plain_table = np.array([(tables.plain[byte & 15], tables.plain[byte >> 4]) for byte in range(256)])
    out = np.zeros((codes.shape[0], columns), dtype=F32)
    for row in range(codes.shape[0]):
        for group, where in enumerate(group_columns(columns, group_size)):
            value, plain = read_scale(scale[0 if group_size == 0 else row, group])
            pairs = codes[row, where.start // 2 : (where.stop + 1) // 2]
            levels = (plain_table if plain else pair_table)[pairs].reshape(-1)[: where.stop - where.start]
            out[row, where] = levels.astype(F32) * value
    return out


# Section 7


def _nearest(value: Array, levels: Array) -> Array:
    """Index of the nearest level, the lower one on a tie: argmin returns the first."""
    distance = np.abs(value.astype(np.float64)[..., None] - np.asarray(levels, dtype=np.float64))
    return np.argmin(distance, axis=-1)


def _pairs(t: Array) -> tuple[Array, Array]:
    return t[..., 0::2], t[..., 1::2]


def choose_pairs(
    t: Array, tables: Tables, pairing: str, importance: Array | None = None
) -> tuple[Array, Array]:
    """Pair rule: bytes and float32 pair errors of t [..., 2 P]."""
    size = np.abs(t)
    n_index = _nearest(size, tables.normal)
    o_index = _nearest(size, tables.outlier[1:]) + 1
    h = np.ones_like(t) if importance is None else importance

    def cost(level: Array) -> Array:
        difference = size - level.astype(F32)
        return difference * difference * h

    (na, nb), (oa, ob) = _pairs(cost(tables.normal[n_index])), _pairs(cost(tables.outlier[o_index]))
    va, vb = _pairs(t * t * h)
    costs = np.stack([na + nb, oa + vb, va + ob])
    if pairing == "optimal":
        choice = np.argmin(costs, axis=0)
    else:
        past = size.astype(np.float64) > (int(tables.normal[7]) + int(tables.outlier[1])) / 2
        (past_a, past_b), (size_a, size_b) = _pairs(past), _pairs(size)
        choice = np.where(past_a & past_b, np.where(size_a >= size_b, 1, 2), past_a * 1 + past_b * 2)
    minus = np.where(t < 0, 8, 0)
    n_nibble = np.where(n_index == 0, 0, n_index + minus)
    (n_a, n_b), (o_a, o_b) = _pairs(n_nibble), _pairs(o_index + minus)
    eight = np.full_like(n_a, 8)
    low, high = np.choose(choice, [n_a, o_a, eight]), np.choose(choice, [n_b, eight, o_b])
    return (low + 16 * high).astype(np.uint8), np.take_along_axis(costs, choice[None], axis=0)[0]


def choose_plain(t: Array, tables: Tables, importance: Array | None = None) -> tuple[Array, Array]:
    """Plain rule: bytes and float32 pair errors of t [..., 2 P]."""
    index = _nearest(t, tables.plain)
    difference = t - tables.plain[index].astype(F32)
    error = difference * difference
    if importance is not None:
        error = error * importance
    (low, high), (error_a, error_b) = _pairs(index), _pairs(error)
    return (low + 16 * high).astype(np.uint8), error_a + error_b


def _padded(values: Array, width: int) -> Array:
    out = np.zeros((*values.shape[:-1], width), dtype=F32)
    out[..., : values.shape[-1]] = values
    return out


def _even(count: int) -> int:
    return count + count % 2


def encode(
    weight: Array,
    scale: Array,
    stored: bytes,
    group_size: int,
    pairing: str = "optimal",
    importance: Array | None = None,
) -> Array:
    """weight float32 [N, K], scale int16 [rows, G] -> uint8 [N, P]."""
    tables = Tables.from_bytes(stored)
    rows, columns = weight.shape
    codes = np.zeros((rows, (columns + 1) // 2), dtype=np.uint8)
    for row in range(rows):
        for group, where in enumerate(group_columns(columns, group_size)):
            value, plain = read_scale(scale[0 if group_size == 0 else row, group])
            width = _even(where.stop - where.start)
            h = None if importance is None else _padded(importance[where], width)
            t = _padded(weight[row, where], width) * (F32(1) / value)
            chosen = choose_plain(t, tables, h) if plain else choose_pairs(t, tables, pairing, h)
            codes[row, where.start // 2 : where.start // 2 + width // 2] = chosen[0]
    return codes


# Section 8


def ordered_sum(pairs: Array) -> np.float64:
    """One row of float32 pair values."""
    total = np.float64(0)
    for start in range(0, len(pairs), 512):
        lanes = [F32(0)] * 16
        for i, value in enumerate(pairs[start : start + 512]):
            lanes[i % 16] = F32(lanes[i % 16] + value)
        for half in (8, 4, 2, 1):
            lanes = [F32(lanes[j] + lanes[j + half]) for j in range(half)]
        total = total + np.float64(lanes[0])
    return total


def _block_sum(pairs: Array) -> np.float64:
    """Rows of pair values: a group is one row, or all rows of the weight."""
    total = np.float64(0)
    for row in pairs:
        total = total + ordered_sum(row)
    return total


def search_group(
    block: Array,
    tables: Tables,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    count: int,
    importance: Array | None,
) -> np.int16:
    """The stored scale of one group: float32 [rows, even width], `count` real values."""
    largest = np.abs(block).max()
    if largest < 2.0**-60:
        return write_scale(F32(1), False)
    even, odd = _pairs(block * block)
    sigma3 = F32(3.0 * np.sqrt(_block_sum(even + odd) / np.float64(count)))
    pair_base = min(F32(largest), sigma3) / F32(tables.normal[7])
    plain_base = F32(largest) / F32(max(int(tables.plain[15]), 1))
    candidates = [(pair_base * F32(multiple), False) for multiple in pair_grid]
    if tables.has_plain:
        for multiple in plain_grid:
            candidates += [(plain_base * F32(multiple), True), (-(plain_base * F32(multiple)), True)]
    best, winner = np.float64(np.inf), (F32(1), False)
    for candidate, plain in candidates:
        scale = round_to_storable(candidate)
        t = block * (F32(1) / scale)
        chosen = (
            choose_plain(t, tables, importance) if plain else choose_pairs(t, tables, pairing, importance)
        )
        error = _block_sum(chosen[1]) * (np.float64(scale) * np.float64(scale))
        if error < best:
            best, winner = error, (scale, plain)
    return write_scale(*winner)


def quantize(
    weight: Array,
    stored: bytes,
    group_size: int,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Array | None = None,
) -> tuple[Array, Array]:
    """weight float32 [N, K] -> codes uint8 [N, P], scale int16 [rows, G]."""
    tables = Tables.from_bytes(stored)
    rows, columns = weight.shape
    groups = group_columns(columns, group_size)
    scale = np.zeros((1 if group_size == 0 else rows, len(groups)), dtype=np.int16)
    blocks = [slice(0, rows)] if group_size == 0 else [slice(row, row + 1) for row in range(rows)]
    for row, block_rows in enumerate(blocks):
        for group, where in enumerate(groups):
            width = group_size if group_size > 0 else _even(columns)
            h = None if importance is None else _padded(importance[where], width)
            block = weight[block_rows, where]
            scale[row, group] = search_group(
                _padded(block, width), tables, pairing, pair_grid, plain_grid, block.size, h
            )
    return encode(weight, scale, stored, group_size, pairing, importance), scale


# Section 9


def abfloat(code: int) -> int:
    magnitude = (8 + (code & 7)) << ((code >> 3) + 4)
    return 0 if code == 0 else min(magnitude, 1 << 15)


OUTLIERS8 = np.array([abfloat(code) for code in range(1, 0x41)])


def _levels8(first: int, second: int) -> tuple[int, int]:
    levels = []
    for this, partner in ((first, second), (second, first)):
        if this == 0x80:
            levels.append(0)
        elif partner == 0x80:
            levels.append(abfloat(this & 0x7F) * (-1 if this & 0x80 else 1))
        else:
            levels.append(this - 256 if this > 127 else this)
    return levels[0], levels[1]


def decode8(codes: Array, scale: Array, columns: int, group_size: int) -> Array:
    """codes uint8 [N, 2 P], scale int16 [rows, G] -> float32 [N, K]."""
    out = np.zeros((codes.shape[0], columns), dtype=F32)
    for row in range(codes.shape[0]):
        for group, where in enumerate(group_columns(columns, group_size)):
            value, _ = read_scale(scale[0 if group_size == 0 else row, group])
            for column in range(where.start, where.stop, 2):
                pair = _levels8(int(codes[row, column]), int(codes[row, column + 1]))
                for offset in range(min(2, where.stop - column)):
                    out[row, column + offset] = F32(pair[offset]) * value
    return out


def encode8(weight: Array, scale: Array, group_size: int, pairing: str = "optimal") -> Array:
    """weight float32 [N, K], scale int16 [rows, G] -> uint8 [N, 2 P]."""
    rows, columns = weight.shape
    codes = np.zeros((rows, _even(columns)), dtype=np.uint8)
    for row in range(rows):
        for group, where in enumerate(group_columns(columns, group_size)):
            value, _ = read_scale(scale[0 if group_size == 0 else row, group])
            width = _even(where.stop - where.start)
            t = _padded(weight[row, where], width) * (F32(1) / value)
            codes[row, where.start : where.start + width] = choose_pairs8(t, pairing)[0]
    return codes


def choose_pairs8(t: Array, pairing: str) -> tuple[Array, Array]:
    """Bytes and float32 pair errors of t [..., 2 P]."""
    size = np.abs(t)
    normal = np.clip(np.rint(t), -127, 127).astype(F32)
    index = _nearest(size, OUTLIERS8)

    def square(difference: Array) -> Array:
        return difference * difference

    (na, nb), (oa, ob) = _pairs(square(t - normal)), _pairs(square(size - OUTLIERS8[index].astype(F32)))
    va, vb = _pairs(square(t))
    costs = np.stack([na + nb, oa + vb, va + ob])
    if pairing == "optimal":
        choice = np.argmin(costs, axis=0)
    else:
        (past_a, past_b), (size_a, size_b) = _pairs(size > 135.5), _pairs(size)
        choice = np.where(past_a & past_b, np.where(size_a >= size_b, 1, 2), past_a * 1 + past_b * 2)
    n_byte = normal.astype(np.int64) & 0xFF
    o_byte = index + 1 + np.where(t < 0, 0x80, 0)
    (n_a, n_b), (o_a, o_b) = _pairs(n_byte), _pairs(o_byte)
    mark = np.full_like(n_a, 0x80)
    out = np.empty_like(n_byte)
    out[..., 0::2] = np.choose(choice, [n_a, o_a, mark])
    out[..., 1::2] = np.choose(choice, [n_b, mark, o_b])
    return out.astype(np.uint8), np.take_along_axis(costs, choice[None], axis=0)[0]


# Section 8, eight bits


def search_group8(block: Array, pairing: str, grid: list[float], count: int) -> np.int16:
    """The stored scale of one group: float32 [rows, even width], `count` real values."""
    largest = F32(np.abs(block).max())
    if largest < 2.0**-60:
        return write_scale(F32(1), False)
    even, odd = _pairs(block * block)
    sigma3 = F32(3.0 * np.sqrt(_block_sum(even + odd) / np.float64(count)))
    best, winner = np.float64(np.inf), F32(1)
    for multiple in grid:
        scale = round_to_storable(min(largest, F32(multiple) * sigma3) / F32(127))
        errors = choose_pairs8(block * (F32(1) / scale), pairing)[1]
        error = _block_sum(errors) * (np.float64(scale) * np.float64(scale))
        if error < best:
            best, winner = error, scale
    return write_scale(winner, False)


def quantize8(weight: Array, group_size: int, pairing: str, grid: list[float]) -> tuple[Array, Array]:
    """weight float32 [N, K] -> codes uint8 [N, 2 P], scale int16 [rows, G]."""
    rows, columns = weight.shape
    groups = group_columns(columns, group_size)
    scale = np.zeros((1 if group_size == 0 else rows, len(groups)), dtype=np.int16)
    blocks = [slice(0, rows)] if group_size == 0 else [slice(row, row + 1) for row in range(rows)]
    for row, block_rows in enumerate(blocks):
        for group, where in enumerate(groups):
            width = group_size if group_size > 0 else _even(columns)
            block = weight[block_rows, where]
            scale[row, group] = search_group8(_padded(block, width), pairing, grid, block.size)
    return encode8(weight, scale, group_size, pairing), scale


# Section 11

PAIR_GRID_11, PLAIN_GRID_11, GRID8_11 = [0.35, 0.5, 0.7, 1.0, 1.4], [0.7, 0.85, 1.0], [1.0, 2.0, 4.0, 8.0]


def quantize_activations(
    x: Array, name: str, group_size: int, pairing: str, stored: bytes | None, static: int | None
) -> tuple[Array, Array]:
    """x float32 [M, K] -> integer levels [M, K], scale float32 [M, G]; `static` is a stored pattern."""
    groups = group_columns(x.shape[1], group_size)
    levels = np.zeros(x.shape, dtype=np.int64)
    scales = np.zeros((len(x), len(groups)), dtype=F32)
    for row in range(len(x)):
        for group, where in enumerate(groups):
            values = x[row, where]
            if not np.isfinite(values).all():
                scales[row, group] = np.nan
                continue
            found = _quantize_run(values, name, pairing, stored, static)
            levels[row, where], scales[row, group] = found
    return levels, scales


def _quantize_run(
    values: Array, name: str, pairing: str, stored: bytes | None, static: int | None
) -> tuple[Array, np.float32]:
    """One group of one token."""
    run = values[None]
    if name == "int8":
        if static is not None:
            scale = read_scale(static)[0]
        else:
            largest = F32(np.abs(values).max())
            scale = F32(1) if largest < 2.0**-60 else F32(largest / F32(127))
        return np.clip(np.rint(values * (F32(1) / scale)), -127, 127).astype(np.int64), scale
    pattern: Array
    if name == "ovp8":
        if static is None:
            codes, pattern = quantize8(run, -1, pairing, GRID8_11)
        else:
            pattern = np.array([[static]], dtype=np.int16)
            codes = encode8(run, pattern, -1, pairing)
        unit = np.array([[0x3F80]], dtype=np.int16)  # decoding with scale 1 gives levels
        return decode8(codes, unit, len(values), -1)[0].astype(np.int64), read_scale(pattern[0, 0])[0]
    assert stored is not None
    if static is None:
        codes, pattern = quantize(run, stored, -1, pairing, PAIR_GRID_11, PLAIN_GRID_11)
    else:
        pattern = np.array([[static]], dtype=np.int16)
        codes = encode(run, pattern, stored, -1, pairing)
    value, plain = read_scale(pattern[0, 0])
    unit = np.array([[0x3F80 | plain]], dtype=np.int16)
    return decode(codes, unit, stored, len(values), -1)[0].astype(np.int64), value


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """float32 a x b + c, rounded once. The product is exact in float64; the sum is rounded to odd there."""
    product = np.float64(a) * np.float64(b)
    total = product + np.float64(c)
    part = total - product
    rest = (product - (total - part)) + (np.float64(c) - part)  # what the sum lost, exactly
    even = np.ascontiguousarray(total).view(np.int64) % 2 == 0
    toward = np.where(rest > 0, np.inf, -np.inf)
    return np.where((rest != 0) & even, np.nextafter(total, toward), total).astype(F32)


def linear_quantized(
    x_levels: Array,
    x_scale: Array,
    w_levels: Array,
    w_scale: Array,
    bias: Array | None,
    group_size: int,
    activation_group_size: int,
) -> Array:
    """Levels int64 [M, K] and [N, K], scales float32 [M, Gx] and [rows, Gw] -> float32 [M, N]."""
    columns = x_levels.shape[1]
    sizes = [size for size in (group_size, activation_group_size) if size > 0]
    width = min(sizes) if sizes else columns
    total = np.zeros((len(x_levels), len(w_levels)), dtype=F32)
    for first in range(0, columns, width):
        run = slice(first, min(first + width, columns))
        sums = (x_levels[:, run] @ w_levels[:, run].T).astype(F32)
        factor = np.broadcast_to(w_scale[:, first // group_size if group_size > 0 else 0], (len(w_levels),))
        factor = np.broadcast_to(factor, total.shape)
        if activation_group_size > 0:
            factor = x_scale[:, first // activation_group_size, None] * factor
        total = fused_multiply_add(sums, factor, total)
    if activation_group_size <= 0:
        total = total * x_scale
    return total if bias is None else total + bias
