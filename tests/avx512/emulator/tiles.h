// AMX: eight tiles per thread. What a processor would refuse (tiles that are not configured or do not fit each other, a
// malformed configuration) is refused here too.
#pragma once

// The compiler's are macros, of assembly.
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#undef _tile_dpbf16ps

namespace olive {
namespace emulator {

constexpr int kTiles = 8, kTileRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured;
  int row_bytes[kTiles];
  int rows[kTiles];
  std::uint8_t tile[kTiles][kTileRows][kRowBytes];
};

inline thread_local Tiles tiles;

inline void check_tile(int tile) {
  if (!tiles.configured) refuse("a tile is used before ldtilecfg");
  if (tile < 0 || tile >= kTiles) refuse("a tile register past the eighth");
  if (tiles.rows[tile] == 0) refuse("a tile is used that is not configured");
}

// The 64 bytes: palette, start row, 14 reserved, 16 x bytes per row (16 bits), 16 x rows.
inline void configure_tiles(const std::uint8_t* from) {
  Tiles fresh = {};
  if (from[0] == 0) {
    tiles = fresh;
    return;
  }
  if (from[0] != 1) refuse("ldtilecfg: palette is not 1");
  if (from[1] != 0) refuse("ldtilecfg: start_row other than 0 is not emulated");
  for (int i = 2; i < 16; ++i) {
    if (from[i] != 0) refuse("ldtilecfg: a reserved byte is not zero");
  }
  for (int tile = 0; tile < 16; ++tile) {
    std::uint16_t bytes;
    std::memcpy(&bytes, from + 16 + 2 * tile, 2);
    const int rows = from[48 + tile];
    if (tile >= kTiles) {
      if (bytes != 0 || rows != 0) refuse("ldtilecfg: a tile past the eighth is configured");
      continue;
    }
    if (bytes > kRowBytes || rows > kTileRows) refuse("ldtilecfg: a tile is larger than 16 x 64 bytes");
    if ((bytes == 0) != (rows == 0)) refuse("ldtilecfg: a tile has rows or bytes but not both");
    fresh.row_bytes[tile] = bytes;
    fresh.rows[tile] = rows;
  }
  fresh.configured = true;
  tiles = fresh;
}

inline void check_product(int sums, int a, int b) {
  check_tile(sums);
  check_tile(a);
  check_tile(b);
  if (sums == a || sums == b || a == b) refuse("tdp: a tile appears twice");
  if (tiles.row_bytes[sums] % 4 || tiles.row_bytes[a] % 4 || tiles.row_bytes[b] % 4) {
    refuse("tdp: a tile's rows are not whole 32-bit words");
  }
  if (tiles.rows[sums] != tiles.rows[a]) refuse("tdp: sums and first factor differ in rows");
  if (tiles.row_bytes[sums] != tiles.row_bytes[b]) refuse("tdp: sums and second factor differ in columns");
  if (tiles.row_bytes[a] / 4 != tiles.rows[b]) refuse("tdp: the factors do not fit each other");
}

// sums [m][n] += a [m][4 k + j] * b [k][4 n + j], bytes to wrapping 32 bits. T and U: the signs of a and b.
template <class T, class U>
inline void multiply_tiles(int sums, int a, int b) {
  check_product(sums, a, b);
  for (int m = 0; m < tiles.rows[sums]; ++m) {
    std::uint32_t row[kRowBytes / 4];
    std::memcpy(row, tiles.tile[sums][m], sizeof(row));
    for (int k = 0; k < tiles.rows[b]; ++k) {
      const std::uint8_t* left = tiles.tile[a][m] + 4 * k;
      for (int n = 0; n < tiles.row_bytes[sums] / 4; ++n) {
        const std::uint8_t* right = tiles.tile[b][k] + 4 * n;
        for (int j = 0; j < 4; ++j) {
          row[n] += static_cast<std::uint32_t>(std::int32_t{static_cast<T>(left[j])} * static_cast<U>(right[j]));
        }
      }
    }
    std::memcpy(tiles.tile[sums][m], row, static_cast<std::size_t>(tiles.row_bytes[sums]));
  }
}

}  // namespace emulator

inline void _tile_loadconfig(const void* from) { emulator::configure_tiles(static_cast<const std::uint8_t*>(from)); }
inline void _tile_release() { emulator::tiles = {}; }

inline void _tile_zero(int tile) {
  emulator::check_tile(tile);
  std::memset(emulator::tiles.tile[tile], 0, sizeof(emulator::tiles.tile[tile]));
}
inline void _tile_loadd(int tile, const void* from, std::ptrdiff_t stride) {
  _tile_zero(tile);
  for (int row = 0; row < emulator::tiles.rows[tile]; ++row) {
    std::memcpy(emulator::tiles.tile[tile][row], static_cast<const char*>(from) + row * stride,
                static_cast<std::size_t>(emulator::tiles.row_bytes[tile]));
  }
}
inline void _tile_stream_loadd(int tile, const void* from, std::ptrdiff_t stride) { _tile_loadd(tile, from, stride); }
inline void _tile_stored(int tile, void* to, std::ptrdiff_t stride) {
  emulator::check_tile(tile);
  for (int row = 0; row < emulator::tiles.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulator::tiles.tile[tile][row],
                static_cast<std::size_t>(emulator::tiles.row_bytes[tile]));
  }
}

// The first letter is the sign of the first factor, the second that of the second.
inline void _tile_dpbssd(int sums, int a, int b) { emulator::multiply_tiles<std::int8_t, std::int8_t>(sums, a, b); }
inline void _tile_dpbsud(int sums, int a, int b) { emulator::multiply_tiles<std::int8_t, std::uint8_t>(sums, a, b); }
inline void _tile_dpbusd(int sums, int a, int b) { emulator::multiply_tiles<std::uint8_t, std::int8_t>(sums, a, b); }
inline void _tile_dpbuud(int sums, int a, int b) { emulator::multiply_tiles<std::uint8_t, std::uint8_t>(sums, a, b); }

#if defined(OLIVE_EMULATE_AMX_BF16)
// Even and odd columns are summed apart from zero, by fused multiply-adds, then added to each other and to the sums;
// subnormal values count as zero, on the way in and out.
namespace emulator {

inline float flush(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

inline float bfloat16(const std::uint8_t* from) {
  std::uint16_t half;
  std::memcpy(&half, from, 2);
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flush(value);
}

}  // namespace emulator

inline void _tile_dpbf16ps(int sums, int a, int b) {
  using namespace emulator;
  check_product(sums, a, b);
  for (int m = 0; m < tiles.rows[sums]; ++m) {
    for (int n = 0; n < tiles.row_bytes[sums] / 4; ++n) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < tiles.rows[b]; ++k) {
        const std::uint8_t *left = tiles.tile[a][m] + 4 * k, *right = tiles.tile[b][k] + 4 * n;
        even = flush(std::fma(bfloat16(left), bfloat16(right), even));
        odd = flush(std::fma(bfloat16(left + 2), bfloat16(right + 2), odd));
      }
      std::memcpy(&sum, tiles.tile[sums][m] + 4 * n, 4);
      sum = flush(flush(sum) + flush(even + odd));
      std::memcpy(tiles.tile[sums][m] + 4 * n, &sum, 4);
    }
  }
}
#endif

}  // namespace olive
