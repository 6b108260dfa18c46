// The 4-bit outlier-victim pair format, for host and device: signed level tables and stored scales.
//
// A byte is a pair: even column in the low nibble, odd column in the high nibble. Nibble 8 is the identifier: its
// value is a victim (0), its partner an outlier. A group whose rule bit is set is plain: no identifier, the nibble
// indexes `plain`. Definition: docs/format.md.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define OLIVE_FN static __host__ __device__ inline
#else
// Internal linkage on purpose: files are compiled for different instruction sets, and a merged inline function
// could be the one that an old processor cannot run.
#define OLIVE_FN static inline
#endif

namespace olive {

constexpr int kIdentifier = 8;
constexpr int kMaxBlock = 128;                   // columns whose integer products are summed before a scale is applied
constexpr float kTiny = 8.673617379884035e-19f;  // 2^-60: groups below it are zeros with scale 1

// Levels by nibble, sign applied; the identifier's own entries are 0. |level| <= 255.
struct Codebook {
  int16_t normal[16];
  int16_t outlier[16];
  int16_t plain[16];
  bool has_plain;
  bool is_int8;  // every level fits an int8
};
static_assert(sizeof(int16_t[48]) == 96, "tables are packed");

// stored: int8 [32] = normal (8), outlier (8), both unsigned bytes; plain (16), signed.
OLIVE_FN Codebook read_codebook(const int8_t* stored) {
  Codebook book;
  book.has_plain = false;
  book.is_int8 = true;
  for (int i = 0; i < 8; ++i) {
    const int16_t normal = static_cast<uint8_t>(stored[i]);
    const int16_t outlier = static_cast<uint8_t>(stored[8 + i]);
    book.normal[i] = normal;
    book.normal[8 + i] = static_cast<int16_t>(-normal);
    book.outlier[i] = outlier;
    book.outlier[8 + i] = static_cast<int16_t>(-outlier);
    book.is_int8 = book.is_int8 && normal <= 127 && outlier <= 127;
  }
  book.normal[8] = 0;  // the identifier
  for (int i = 0; i < 16; ++i) {
    book.plain[i] = stored[16 + i];
    book.has_plain = book.has_plain || stored[16 + i] != 0;
  }
  return book;
}

OLIVE_FN void decode_pair(const Codebook& book, uint8_t byte, bool plain, int16_t* even, int16_t* odd) {
  const int low = byte & 15, high = byte >> 4;
  *even = plain ? book.plain[low] : high == kIdentifier ? book.outlier[low] : book.normal[low];
  *odd = plain ? book.plain[high] : low == kIdentifier ? book.outlier[high] : book.normal[high];
}

// Level of a nibble beside its partner, read from the stored codebook [32].
OLIVE_FN int level(const int8_t* codebook, bool plain, int nibble, int partner) {
  if (plain) return codebook[16 + nibble];
  if (nibble == kIdentifier) return 0;
  const int magnitude = static_cast<uint8_t>(codebook[(partner == kIdentifier ? 8 : 0) + (nibble & 7)]);
  return nibble & 8 ? -magnitude : magnitude;
}

OLIVE_FN float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

OLIVE_FN uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A stored scale is a bfloat16 bit pattern whose lowest mantissa bit is the rule bit.
OLIVE_FN float scale_value(int16_t stored) {
  return bits_to_float(static_cast<uint32_t>(static_cast<uint16_t>(stored) & 0xFFFEu) << 16);
}

OLIVE_FN bool scale_is_plain(int16_t stored) { return (stored & 1) != 0; }

// Nearest storable scale, ties to even: 17 low bits of the float32 are dropped.
OLIVE_FN float round_scale(float scale) {
  const uint32_t bits = float_to_bits(scale);
  return bits_to_float((bits + 0xFFFFu + ((bits >> 17) & 1u)) & ~0x1FFFFu);
}

OLIVE_FN int16_t pack_scale(float rounded, bool plain) {
  return static_cast<int16_t>((float_to_bits(rounded) >> 16) | (plain ? 1u : 0u));
}

}  // namespace olive
