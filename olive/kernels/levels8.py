"""Device helpers of eight bits: the nearest level, the choice of a pair and its error, and back to levels.

The format is docs/format.md, section 9. Outliers are floats of 3 fraction bits, so rounding a float32 to one
of them is integer arithmetic on its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from olive.formats.ovp8 import IDENTIFIER8 as FORMAT_IDENTIFIER8
from olive.kernels.levels import choose_pairs, nearest_int8, signed

IDENTIFIER8 = tl.constexpr(FORMAT_IDENTIFIER8)
SHIFT = tl.constexpr(20)  # fraction bits that a float32 has and an outlier has not
CODE_BIAS = tl.constexpr(1072)  # bits of the float32 128 = 2^7 >> 20: what code 0 would be
MAX_CODE = tl.constexpr(0x40)  # 32768
RANGE_END = tl.constexpr(135.5)  # of "paper" pairing: halfway between 127 and the least outlier, 144


@triton.jit
def nearest_outlier8(
    size,  # float32, >= 0
):
    """Code, int32 1..64, and magnitude, float32, of the nearest outlier; ties go to the lower one."""
    bits = tl.minimum(tl.maximum(size, 144.0), 32768.0).to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF) >> SHIFT  # one less than half: a tie stays below
    return kept - CODE_BIAS, (kept << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def encode_pairs8(
    even,  # float32, values in units of the scale
    odd,
    OPTIMAL: tl.constexpr,  # pairing: "optimal", else "paper"
):
    """What becomes of each pair: two bytes, int32; error, float32; two signed levels, float32.

    The arithmetic is the format's: compile with `enable_fp_fusion=False`.
    """
    even_size, odd_size = tl.abs(even), tl.abs(odd)
    even_level, odd_level = nearest_int8(even), nearest_int8(odd)
    even_code, even_far = nearest_outlier8(even_size)
    odd_code, odd_far = nearest_outlier8(odd_size)
    even_normal, odd_normal = even - even_level, odd - odd_level
    even_outlier, odd_outlier = even_size - even_far, odd_size - odd_far
    normal_normal = even_normal * even_normal + odd_normal * odd_normal
    outlier_victim = even_outlier * even_outlier + odd_size * odd_size
    victim_outlier = even_size * even_size + odd_outlier * odd_outlier
    even_out, odd_out, error = choose_pairs(
        even_size, odd_size, normal_normal, outlier_victim, victim_outlier, RANGE_END, OPTIMAL
    )
    even_code = even_code | tl.where(even < 0, 0x80, 0)
    odd_code = odd_code | tl.where(odd < 0, 0x80, 0)
    low = tl.where(even_out, even_code, tl.where(odd_out, IDENTIFIER8, even_level.to(tl.int32) & 0xFF))
    high = tl.where(odd_out, odd_code, tl.where(even_out, IDENTIFIER8, odd_level.to(tl.int32) & 0xFF))
    # NaN, 0 times the infinite reciprocal of a subnormal scale, has code 0.
    even_zero, odd_zero = odd_out | (even_level != even_level), even_out | (odd_level != odd_level)
    even_level = tl.where(even_out, signed(even_far, even), tl.where(even_zero, 0.0, even_level))
    odd_level = tl.where(odd_out, signed(odd_far, odd), tl.where(odd_zero, 0.0, odd_level))
    return low, high, error, even_level, odd_level


@triton.jit
def level8(
    byte,  # int32, 0..255
    partner,  # int32, the other byte of the pair
):
    """The signed level of a byte, float32; invalid pairs decode as docs/format.md says."""
    index = byte & 0x7F
    outlier = (tl.minimum(index, MAX_CODE) + CODE_BIAS) << SHIFT
    outlier = (outlier | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)
    # 2^23 + (byte + 128), minus 2^23 + 128: conversions of integers run at a quarter of this speed.
    normal = ((byte ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    normal = tl.where(byte == IDENTIFIER8, 0.0, normal)
    return tl.where((partner == IDENTIFIER8) & (index != 0), outlier, normal)


@triton.jit
def split_pairs8(
    pairs,  # int16 [R, P], two bytes each, the even column's the lower one
):
    """Both bytes, int32 [R, P] of 0..255."""
    return pairs.to(tl.int32) & 0xFF, (pairs.to(tl.int32) >> 8) & 0xFF


@triton.jit
def level_table8(
    DTYPE: tl.constexpr,  # type of the levels, which holds all of them exactly
):
    """The level of every byte beside an identifier, then of every byte beside another one: [512]."""
    entry = tl.arange(0, 512)
    return level8(entry & 0xFF, tl.where(entry < 256, IDENTIFIER8, 0)).to(DTYPE)


@triton.jit
def decode_pairs8(
    table,  # [512] from `level_table8`
    pairs,  # int16 [R, P]
):
    """Levels [R, 2 P] in the table's type.

    With a look-up in shared memory a weight costs 11 instructions, as an H100 has time for at 80 % of the
    speed of its memory, 14 bytes per clock and SM; with `level8` it would be 21.
    """
    ROWS: tl.constexpr = pairs.shape[0]
    PAIRS: tl.constexpr = pairs.shape[1]
    low, high = split_pairs8(pairs)
    # An identifier less itself less 1 is negative, so this subtracts 256 from the partner of one.
    even = low | (((high ^ IDENTIFIER8) - 1) & -256)
    odd = high | (((low ^ IDENTIFIER8) - 1) & -256)
    index = tl.reshape(tl.join(even, odd), [2 * ROWS * PAIRS]) + 256
    return tl.reshape(tl.gather(table, index, 0), [ROWS, 2 * PAIRS])
