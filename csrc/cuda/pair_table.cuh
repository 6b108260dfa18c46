// Decoding through shared memory: a table of every pair of codes as two 16-bit floats.
//
// One byte is one pair, and a pair is one fragment register. 256 bytes x 2 rules x 4 bytes = 2 KiB; each lane has a
// copy of its own in its own bank, so a warp's 32 look-ups never wait for each other: 64 KiB. The entry of a byte is at
// 256 x byte + 128 x rule + 4 x lane: an address of two bytes, of which the lower one is the same for a whole group.
//
// Counted for a word of four pairs: 4 byte permutations and 4 loads, one instruction a weight. In registers, with byte
// permutes on the level tables, a weight takes 5 to 6: flags of identifiers, two look-ups of magnitudes, selection,
// signs, widening. An H200 reads about 40 codes per clock and multiprocessor, which issues 128 lane instructions per
// clock, 64 of them on integers: 40 in all with the table, 20 of them on integers; over 200 with permutes. The table is
// bound by its loads, 64 weights per clock. Filling it takes 512 clocks of stores, while the first codes are on their
// way.
#pragma once

#include "core/floats.h"
#include "core/ovp.h"
#include "cuda/ptx.cuh"

namespace olive::cuda {

constexpr int kTableBytes = 256 * 2 * 32 * 4;

template <class T>
struct Bits;
template <>
struct Bits<__half> {
  static constexpr Float kType = Float::f16;
  static __device__ uint32_t of(float value) { return float_to_f16(value); }
};
template <>
struct Bits<__nv_bfloat16> {
  static constexpr Float kType = Float::bf16;
  static __device__ uint32_t of(float value) { return float_to_bf16(value); }
};

// Fills the table with all threads of the block: entry(plain, low nibble, high nibble). A barrier has to follow.
template <class Entry>
__device__ __forceinline__ void fill_entries(unsigned char* table, int thread, int threads, Entry entry) {
  for (int i = thread; i < 512; i += threads) {
    const uint32_t bits = entry((i & 1) != 0, i >> 1 & 15, i >> 5);
    const uint4 copies = make_uint4(bits, bits, bits, bits);
    // Eight lanes store to eight different quarters of the banks.
    for (int copy = 0; copy < 8; ++copy) {
      *reinterpret_cast<uint4*>(table + i * 128 + ((copy + thread) & 7) * 16) = copies;
    }
  }
}

// Levels times `unit`, even columns in the low half.
template <class T>
__device__ __forceinline__ void fill_table(unsigned char* table, const int8_t* codebook, int thread, int threads,
                                           float unit) {
  fill_entries(table, thread, threads, [&](bool plain, int low, int high) {
    return Bits<T>::of(static_cast<float>(level(codebook, plain, low, high)) * unit) |
           Bits<T>::of(static_cast<float>(level(codebook, plain, high, low)) * unit) << 16;
  });
}

// Levels as int8, even columns in the lowest byte; the upper half is zero.
__device__ __forceinline__ void fill_int8_table(unsigned char* table, const int8_t* codebook, int thread, int threads) {
  fill_entries(table, thread, threads, [&](bool plain, int low, int high) {
    return (static_cast<uint32_t>(level(codebook, plain, low, high)) & 0xFFu) |
           (static_cast<uint32_t>(level(codebook, plain, high, low)) & 0xFFu) << 8;
  });
}

// Where a lane looks things up, for its two rows: its bank, and its half of the entries for the row's rule. `scales`
// are the stored scales of the rows, neighbours in the packed layout.
struct TableRows {
  uint32_t row[2];
  __device__ TableRows(uint32_t scales, int lane) {
    row[0] = static_cast<uint32_t>(lane * 4) | (scales << 7 & 0x80u);
    row[1] = static_cast<uint32_t>(lane * 4) | (scales >> 9 & 0x80u);
  }
};

__device__ __forceinline__ float low_scale(uint32_t scales) { return bits_to_float((scales & 0xFFFEu) << 16); }
__device__ __forceinline__ float high_scale(uint32_t scales) { return bits_to_float(scales & 0xFFFE0000u); }

// The entry of byte kByte of four codes. The address is two bytes: the code above its row's place. One permutation puts
// them together.
template <int kByte>
__device__ __forceinline__ uint32_t look_up(const unsigned char* table, uint32_t codes, uint32_t row) {
  return *reinterpret_cast<const uint32_t*>(table + __byte_perm(codes, row, 0x5504 + 16 * kByte));
}

// Four codes of a lane to its four registers of a 16 x 16 fragment.
__device__ __forceinline__ void decode_fragment(uint32_t (&to)[4], const unsigned char* table, const TableRows& rows,
                                                uint32_t codes) {
  to[0] = look_up<0>(table, codes, rows.row[0]);
  to[1] = look_up<1>(table, codes, rows.row[1]);
  to[2] = look_up<2>(table, codes, rows.row[0]);
  to[3] = look_up<3>(table, codes, rows.row[1]);
}

// Eight codes of a lane, sixteen columns each, to its four registers of a 16 x 32 fragment of int8: two look-ups and a
// permutation a register, five instructions for four weights.
__device__ __forceinline__ void decode_int8_fragment(uint32_t (&to)[4], const unsigned char* table,
                                                     const TableRows& rows, uint32_t first, uint32_t second) {
  const auto join = [](uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); };
  to[0] = join(look_up<0>(table, first, rows.row[0]), look_up<2>(table, first, rows.row[0]));
  to[1] = join(look_up<1>(table, first, rows.row[1]), look_up<3>(table, first, rows.row[1]));
  to[2] = join(look_up<0>(table, second, rows.row[0]), look_up<2>(table, second, rows.row[0]));
  to[3] = join(look_up<1>(table, second, rows.row[1]), look_up<3>(table, second, rows.row[1]));
}

}  // namespace olive::cuda
