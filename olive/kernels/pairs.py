"""Device helpers that read the format: stored scales, levels of nibbles, tables of whole pairs.

A byte holds two neighbours along K, the even column in its low nibble. Under the pair rule a nibble is a sign
and an index, and 8 is the victim; under the plain rule it is an index into the third table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from olive.formats.codebooks import IDENTIFIER as FORMAT_IDENTIFIER

IDENTIFIER = tl.constexpr(FORMAT_IDENTIFIER)
OUTLIER = tl.constexpr(8)  # where the tables of outliers and of plain levels start in a codebook
PLAIN = tl.constexpr(16)


@triton.jit
def unpack_scale(stored):
    """Value, float32, and rule bit, int32 0 or 1, of int16 bit patterns."""
    bits = stored.to(tl.int32)
    return ((bits & -2) << 16).to(tl.float32, bitcast=True), bits & 1


@triton.jit
def load_scale(
    scale_ptr,  # int16 [N or 1, G]
    row,  # rows of the weight, any shape
    column,  # columns, broadcastable with row
    rows,  # N
    columns,  # K
    stride,  # scales between rows, 0 per tensor
    GROUP_SIZE: tl.constexpr,  # columns per group, 0 = one scale for the whole row
):
    """Stored scales of some columns, zeros outside of the weight; in row's shape if GROUP_SIZE is 0."""
    if GROUP_SIZE == 0:
        return tl.load(scale_ptr + row.to(tl.int64) * stride, mask=row < rows, other=0)
    else:  # noqa: RET505  (Triton compiles one branch only if the other is spelled out)
        inside = (row < rows) & (column + 0 * row < columns)  # comparing a scalar breaks the interpreter
        return tl.load(scale_ptr + row.to(tl.int64) * stride + column // GROUP_SIZE, mask=inside, other=0)


@triton.jit
def level(
    codebook_ptr,  # int8 [32]
    nibble,  # int32, 0..15
    partner,  # int32, the other nibble of the byte
    plain,  # bool or 0/1
):
    """The signed level of a nibble, float32.

    Indices are within 0..31 whatever the bytes are, so the load needs no mask. A victim needs no case of its
    own: its index is 0, and both tables of magnitudes start with 0.
    """
    table = tl.where(partner == IDENTIFIER, OUTLIER, 0)
    byte = tl.load(codebook_ptr + tl.where(plain != 0, PLAIN + nibble, table + (nibble & 7))).to(tl.int32)
    magnitude = byte & 0xFF
    signed = tl.where(nibble >= 8, -magnitude, magnitude)
    return tl.where(plain != 0, byte, signed).to(tl.float32)


@triton.jit
def pair_table(
    codebook_ptr,  # int8 [32]
    DTYPE: tl.constexpr,  # type of the decoded levels
):
    """Both levels of every byte as one word, even column in the lower half: int32 [512], int16 for int8.

    Entry 256 * rule bit + byte. Halves are int8 for int8, where the levels have to fit it, float16 for
    float16, else bfloat16, which is the upper half of a float32: levels, integers up to 255, are exact in
    both.
    """
    entry = tl.arange(0, 512)
    low, high, plain = entry & 15, (entry >> 4) & 15, entry >> 8
    even, odd = level(codebook_ptr, low, high, plain), level(codebook_ptr, high, low, plain)
    if DTYPE.is_int8():  # a smaller table, so that more lanes look the same word of a bank up
        words = ((even.to(tl.int32) & 0xFF) | (odd.to(tl.int32) << 8)).to(tl.int16)
    elif DTYPE.is_fp16():
        even_bits = even.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        odd_bits = odd.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        words = (even_bits & 0xFFFF) | (odd_bits << 16)
    else:
        even_bits = even.to(tl.int32, bitcast=True) >> 16
        odd_bits = odd.to(tl.int32, bitcast=True) >> 16
        words = (even_bits & 0xFFFF) | (odd_bits << 16)
    return words


@triton.jit
def decode_pairs(
    table,  # from `pair_table` for DTYPE
    codes,  # uint8 [R, P]
    plain,  # int32, 0 or 1, broadcastable to [R, P]
    DTYPE: tl.constexpr,
):
    """Levels [R, 2 P] of packed codes in DTYPE.

    One look-up in shared memory per byte. Its word already holds the two neighbours as the matrix units read
    them, so that join and reshape move nothing, and a weight costs two to three instructions. Nibble by
    nibble (index, table, sign, conversion) it is about twelve, more than an H100 has time for at the speed of
    its memory, where an SM gets 29 weights per clock and starts 128 instructions.
    """
    ROWS: tl.constexpr = codes.shape[0]
    PAIRS: tl.constexpr = codes.shape[1]
    index = tl.reshape(codes.to(tl.int32) | (plain << 8), [ROWS * PAIRS])
    words = tl.reshape(tl.gather(table, index, 0), [ROWS, PAIRS])
    if DTYPE.is_int8():
        even, odd = words.to(tl.int8), (words >> 8).to(tl.int8)
    elif DTYPE.is_fp32():
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.int16).to(DTYPE, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(even, odd), [ROWS, 2 * PAIRS])
