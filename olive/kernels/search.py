"""Device helpers of the scale search: sums in the format's order over segments, and candidates.

A segment is the part of one row that lies in one group, columns [start, stop). A program works on several,
laid out as [segments, 16 lanes], one pair of columns per lane and step: the ordered sum's 16 lanes are then
the tensor's, a step is one addition, and no sum is left to an order that Triton chooses. Values are loaded
anew for every candidate, from the L1 cache: two loads to ninety instructions are cheaper than the registers
to hold them, and segments may have any length.

All sums of squares are positive, so that the zeros past a segment's end add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from olive.formats.scales import TINY as FORMAT_TINY
from olive.kernels.levels import encode_pair_rule, encode_plain_rule, load_pair, reciprocal
from olive.kernels.levels8 import encode_pairs8

LANES = tl.constexpr(16)
STEP_COLUMNS = tl.constexpr(32)  # a pair per lane
CHUNK_STEPS = tl.constexpr(32)  # 512 pairs are summed in float32 before the sum goes on in float64
TINY = tl.constexpr(FORMAT_TINY)
INFINITY_BITS = tl.constexpr(0x7F800000)

# How a candidate encodes.
PAIR_RULE = tl.constexpr(0)
PLAIN_RULE = tl.constexpr(1)
EIGHT_BITS = tl.constexpr(2)


@triton.jit
def magnitude_bits(
    value,  # float32
):
    """Bits of |value|, int32: rising with it, from `INFINITY_BITS` on if it is not finite."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fold_lanes(
    lanes,  # float32 [segments, 16]
):
    """Lanes added 8, 4, 2, 1 apart: float64 [segments]. Each `tl.sum` has two terms, so only one order."""
    SEGMENTS: tl.constexpr = lanes.shape[0]
    lanes = tl.sum(tl.reshape(lanes, [SEGMENTS, 2, 8]), 1)
    lanes = tl.sum(tl.reshape(lanes, [SEGMENTS, 2, 4]), 1)
    lanes = tl.sum(tl.reshape(lanes, [SEGMENTS, 2, 2]), 1)
    return tl.sum(lanes, 1).to(tl.float64)


@triton.jit
def segment_stats(
    weight_ptr,  # float [N, K]
    offset,  # int64 [segments], where the rows start
    start,  # int32 [segments], columns
    stop,
    steps,  # that cover the longest segment
):
    """Largest magnitude, float32, and ordered sum of squares, float64, of each segment.

    The former is not finite if one of the values is not.
    """
    SEGMENTS: tl.constexpr = offset.shape[0]
    lane = 2 * tl.arange(0, LANES)[None, :]
    largest = tl.full([SEGMENTS, LANES], 0, tl.int32)  # bits, since the maximum of floats may drop NaN
    energy = tl.full([SEGMENTS], 0.0, tl.float64)
    for chunk in range(0, steps, CHUNK_STEPS):
        lanes = tl.full([SEGMENTS, LANES], 0.0, tl.float32)
        for step in range(chunk, tl.minimum(chunk + CHUNK_STEPS, steps)):
            column = start[:, None] + step * STEP_COLUMNS + lane
            even, odd = load_pair(weight_ptr, offset[:, None], column, stop[:, None])
            largest = tl.maximum(largest, tl.maximum(magnitude_bits(even), magnitude_bits(odd)))
            lanes += even * even + odd * odd
        energy += fold_lanes(lanes)
    return tl.max(largest, 1).to(tl.float32, bitcast=True), energy


@triton.jit
def segment_error(
    weight_ptr,  # float [N, K]
    importance_ptr,  # float32 [K], None = all alike
    offset,  # as `segment_stats`
    start,
    stop,
    steps,
    scale,  # float32 [segments]
    codebook,  # from `load_codebook`; None with eight bits
    RULE: tl.constexpr,  # PAIR_RULE, PLAIN_RULE or EIGHT_BITS, the latter without importance
    OPTIMAL: tl.constexpr,
):
    """Ordered sum of the pair errors of each segment, float64, in squared units of the scale."""
    SEGMENTS: tl.constexpr = offset.shape[0]
    lane = 2 * tl.arange(0, LANES)[None, :]
    factor = reciprocal(scale)[:, None]
    total = tl.full([SEGMENTS], 0.0, tl.float64)
    for chunk in range(0, steps, CHUNK_STEPS):
        lanes = tl.full([SEGMENTS, LANES], 0.0, tl.float32)
        for step in range(chunk, tl.minimum(chunk + CHUNK_STEPS, steps)):
            column = start[:, None] + step * STEP_COLUMNS + lane
            even, odd = load_pair(weight_ptr, offset[:, None], column, stop[:, None])
            even, odd = even * factor, odd * factor
            if importance_ptr is not None:
                even_weight, odd_weight = load_pair(importance_ptr, 0, column, stop[:, None])
            else:
                even_weight, odd_weight = None, None
            if RULE == EIGHT_BITS:
                _, _, error, _, _ = encode_pairs8(even, odd, OPTIMAL)
            elif RULE == PLAIN_RULE:
                _, error, _, _ = encode_plain_rule(even, odd, even_weight, odd_weight, codebook[2])
            else:
                _, error, _, _ = encode_pair_rule(
                    even, odd, even_weight, odd_weight, codebook[0], codebook[1], OPTIMAL
                )
            lanes += error
        total += fold_lanes(lanes)
    return total


@triton.jit
def three_sigmas(
    energy,  # float64
    count,  # int, values in the group
):
    """Three times the root mean square, float32."""
    return (3.0 * tl.sqrt(energy / count.to(tl.float64))).to(tl.float32)


@triton.jit
def base_scales(
    largest,  # float32
    energy,  # float64
    count,  # int, values in the group
    codebook,  # from `load_codebook`
):
    """What the grids multiply: min(max |w|, 3 sigma) / normal[7] and max |w| / plain[15], float32."""
    normal, _, plain = codebook
    pair_base = tl.math.div_rn(tl.minimum(largest, three_sigmas(energy, count)), normal[7])
    plain_base = tl.math.div_rn(largest, tl.maximum(plain[15], 1.0))
    return pair_base, plain_base


@triton.jit
def round_scale(scale):
    """The nearest storable scale, ties to even: 17 bits of the float32 dropped."""
    bits = scale.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF + ((bits >> 17) & 1)) & -0x20000).to(tl.float32, bitcast=True)


@triton.jit
def candidate_scale(base, multiple):
    """base x multiple, storable."""
    return round_scale(base * multiple)


@triton.jit
def candidate_scale8(
    largest,  # float32
    three_sigma,  # float32
    multiple,
):
    """A candidate of eight bits: min(max |w|, multiple x 3 sigma) / 127, storable."""
    return round_scale(tl.math.div_rn(tl.minimum(largest, multiple * three_sigma), 127.0))


@triton.jit
def scaled_error(error, scale):
    """Errors in units of the weight, float64."""
    wide = scale.to(tl.float64)
    return error * (wide * wide)


@triton.jit
def pack_scale(
    scale,  # float32, storable
    plain,  # int32, rule bits
    largest,  # float32, of the group
):
    """Stored scales, int16; groups of next to nothing get scale 1 under the pair rule."""
    scale = tl.where(largest < TINY, 1.0, scale)
    plain = tl.where(largest < TINY, 0, plain)
    return ((scale.to(tl.int32, bitcast=True) >> 16) | plain).to(tl.int16)
