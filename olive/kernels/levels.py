"""Device helpers of the encoder: tables of levels, the nearest level, the choice of a pair and its error.

The arithmetic is the format's (docs/format.md, section 7): float32, in this order. Kernels that use it are
launched with `enable_fp_fusion=False`: a fused multiply-add rounds once where the format rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from olive.kernels.pairs import IDENTIFIER


@triton.jit
def load_levels(
    codebook_ptr,  # int8 [32]
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,  # 0xFF reads magnitudes, -1 signed levels
):
    """A table as a tuple of float32 scalars: read once, since Triton never moves a load out of a loop."""
    levels = ()
    for i in tl.static_range(COUNT):
        byte = tl.load(codebook_ptr + FIRST + i).to(tl.int32)
        # Not (*levels, ...): Triton's compiler knows no unpacking.
        levels = levels + ((byte & MASK).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return levels


@triton.jit
def load_codebook(codebook_ptr):
    """The normal, outlier and plain tables: tuples of 8, 8 and 16 float32 scalars."""
    return (
        load_levels(codebook_ptr, 0, 8, 0xFF),
        load_levels(codebook_ptr, 8, 8, 0xFF),
        load_levels(codebook_ptr, 16, 16, -1),
    )


@triton.jit
def has_plain(
    codebook,  # from `load_codebook`
):
    """Whether there is a plain table: one that is there rises."""
    return codebook[2][0] != codebook[2][15]


@triton.jit
def nearest(
    value,  # float32
    levels,  # tuple of rising float32 scalars
    FIRST: tl.constexpr,  # lowest index to choose
):
    """Index, int32, and level, float32, nearest to each value; ties go to the lower one, NaN to the last."""
    index = tl.full(value.shape, FIRST, tl.int32)
    level = tl.full(value.shape, 0.0, tl.float32) + levels[FIRST]
    for i in tl.static_range(FIRST + 1, len(levels)):
        # Midpoints of integers are exact. Not `value > midpoint`, which is false for NaN.
        above = ~(value <= (levels[i - 1] + levels[i]) * 0.5)
        index = tl.where(above, i, index)
        level = tl.where(above, levels[i], level)
    return index, level


@triton.jit
def squared_error(
    value,
    level,
    importance,  # None = 1
):
    error = value - level
    error = error * error
    if importance is not None:
        error = error * importance
    return error


@triton.jit
def choose_pairs(
    even_size,  # float32, magnitudes in units of the scale
    odd_size,
    normal_normal,  # float32, errors of the three kinds of pair
    outlier_victim,
    victim_outlier,
    range_end,  # float32, largest magnitude that is no outlier in "paper" pairing
    OPTIMAL: tl.constexpr,  # pairing: "optimal", else "paper"
):
    """Whether the even value, and whether the odd one, becomes an outlier, and the error of the pair."""
    if OPTIMAL:
        even_out = (outlier_victim < normal_normal) & (outlier_victim <= victim_outlier)
        odd_out = (victim_outlier < normal_normal) & ~even_out
    else:
        even_past, odd_past = even_size > range_end, odd_size > range_end
        even_out = even_past & (~odd_past | (even_size >= odd_size))
        odd_out = odd_past & ~even_out
    error = tl.where(even_out, outlier_victim, tl.where(odd_out, victim_outlier, normal_normal))
    return even_out, odd_out, error


@triton.jit
def signed(
    magnitude,  # float32, >= 0
    value,  # float32, its sign is taken
):
    """The magnitude with the value's sign; zero has none."""
    return tl.where(value < 0, 0.0 - magnitude, magnitude)


@triton.jit
def encode_pair_rule(
    even,  # float32, values in units of the scale
    odd,
    even_importance,  # float32, None = 1
    odd_importance,
    normal,  # tuples of 8 float32 scalars
    outlier,
    OPTIMAL: tl.constexpr,  # pairing: "optimal", else "paper"
):
    """What becomes of each pair under the pair rule: byte, error, and both levels.

    The byte is an int32, the error a float32 in squared units of the scale, the levels signed float32.
    """
    even_size, odd_size = tl.abs(even), tl.abs(odd)
    even_normal, even_level = nearest(even_size, normal, 0)
    odd_normal, odd_level = nearest(odd_size, normal, 0)
    even_outlier, even_far = nearest(even_size, outlier, 1)
    odd_outlier, odd_far = nearest(odd_size, outlier, 1)
    normal_normal = squared_error(even_size, even_level, even_importance) + squared_error(
        odd_size, odd_level, odd_importance
    )
    outlier_victim = squared_error(even_size, even_far, even_importance) + squared_error(
        odd_size, 0.0, odd_importance
    )
    victim_outlier = squared_error(even_size, 0.0, even_importance) + squared_error(
        odd_size, odd_far, odd_importance
    )
    range_end = (normal[7] + outlier[1]) * 0.5
    even_out, odd_out, error = choose_pairs(
        even_size, odd_size, normal_normal, outlier_victim, victim_outlier, range_end, OPTIMAL
    )

    even_sign, odd_sign = tl.where(even < 0, 8, 0), tl.where(odd < 0, 8, 0)
    low = tl.where(even_normal == 0, 0, even_normal | even_sign)
    low = tl.where(even_out, even_outlier | even_sign, tl.where(odd_out, IDENTIFIER, low))
    high = tl.where(odd_normal == 0, 0, odd_normal | odd_sign)
    high = tl.where(odd_out, odd_outlier | odd_sign, tl.where(even_out, IDENTIFIER, high))
    even_level = tl.where(even_out, even_far, tl.where(odd_out, 0.0, even_level))
    odd_level = tl.where(odd_out, odd_far, tl.where(even_out, 0.0, odd_level))
    return low | (high << 4), error, signed(even_level, even), signed(odd_level, odd)


@triton.jit
def encode_plain_rule(
    even,  # float32, values in units of the scale
    odd,
    even_importance,  # float32, None = 1
    odd_importance,
    levels,  # tuple of 16 float32 scalars
):
    """What becomes of each pair under the plain rule, as `encode_pair_rule`."""
    low, even_level = nearest(even, levels, 0)
    high, odd_level = nearest(odd, levels, 0)
    error = squared_error(even, even_level, even_importance) + squared_error(odd, odd_level, odd_importance)
    return low | (high << 4), error, even_level, odd_level


@triton.jit
def nearest_int8(
    value,  # float32
):
    """The nearest integer of -127..127, float32, ties to even; NaN stays."""
    value = tl.clamp(value, -127.0, 127.0, propagate_nan=tl.PropagateNan.ALL)
    # 1.5 x 2^23: floats are whole numbers there, so that adding it rounds, and taking it away is exact.
    return (value + 12582912.0) - 12582912.0


@triton.jit
def reciprocal(value):
    """1 / value, rounded to nearest as IEEE says; `/` may be two units in the last place off on a GPU."""
    return tl.math.div_rn(1.0, value)


@triton.jit
def load_pair(
    weight_ptr,  # float, or importance
    offset,  # int64, where the row starts
    column,  # the even column
    stop,  # first column that is not there: zeros from here on
):
    """The values of an even column and its neighbour, float32."""
    even = tl.load(weight_ptr + offset + column, mask=column < stop, other=0.0)
    odd = tl.load(weight_ptr + offset + column + 1, mask=column + 1 < stop, other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)
