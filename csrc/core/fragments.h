// The packed layout of a 4-bit weight on NVIDIA GPUs, for host and device: codes in the order of matrix fragments.
//
// The weight is the 16 x 16 operand A of mma.m16n8k16 and wgmma, whose registers hold two neighbours along K: one
// pair, one byte of codes. A tile is 16 rows x 64 columns = 512 bytes, 16 bytes per lane: one load gives a lane its
// part of four products along K, and a warp reads 512 bytes in a row. Tiles of the same 16 rows follow each other
// along K, so that a warp reads one stream.
//
//   packed codes  [T, ceil(K / 64), 512], byte 16 lane + 4 step + register; T = 4 ceil(N / 64), a warpgroup's tiles
//   packed scale  [T, G, 16], element 2 r + h is row 8 h + r: a lane's two rows are neighbours
//
// Lane l of a warp holds rows l / 4 and l / 4 + 8; register bit 0 chooses the row, bit 1 the second eight columns.
// What lies past N or K is zero; a per-tensor scale is repeated for every row.
//
// Integer products read the same bytes. A register of their 16 x 32 operand holds four int8 of one row: registers 0
// and 2 (1 and 3) of a step, so columns 2 j, 2 j + 1, 8 + 2 j, 8 + 2 j + 1 of its sixteen where the instruction means
// 4 j .. 4 j + 3. A sum over columns does not mind, if the levels of activations are in the same order (level_byte).
#pragma once

#include <cstdint>

#include "core/ovp.h"

namespace olive {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
constexpr int kTileBytes = kTileRows * kTileColumns / 2;
static_assert(kTileBytes == 32 * 16, "sixteen bytes for each lane of a warp");

struct TilePair {
  int row;   // 0..15
  int pair;  // 0..31: columns 2 pair, 2 pair + 1
};

// Which pair a byte of a tile holds.
OLIVE_FN TilePair tile_pair(int byte) {
  const int lane = byte / 16, step = byte / 4 % 4, reg = byte % 4;
  return {lane / 4 + 8 * (reg & 1), 8 * step + 4 * (reg >> 1) + lane % 4};
}

// The inverse: the byte of a tile that holds a pair.
OLIVE_FN int tile_byte(int row, int pair) {
  const int lane = row % 8 * 4 + pair % 4, step = pair / 8, reg = row / 8 + 2 * (pair / 4 % 2);
  return 16 * lane + 4 * step + reg;
}

// Where among the sixteen int8 levels of activations a pair's two are, pair 0..7.
OLIVE_FN int level_byte(int pair) { return 4 * (pair % 4) + 2 * (pair / 4); }

// Where packed scales keep row 0..15 of a tile, and which row an element is.
OLIVE_FN int tile_scale(int row) { return row % 8 * 2 + row / 8; }
OLIVE_FN int tile_scale_row(int element) { return element % 2 * 8 + element / 2; }

OLIVE_FN int64_t row_tiles(int64_t n) { return (n + 63) / 64 * 4; }
OLIVE_FN int64_t column_tiles(int64_t k) { return (k + kTileColumns - 1) / kTileColumns; }
OLIVE_FN int64_t group_count(int64_t k, int group_size) {
  return group_size <= 0 ? 1 : (k + group_size - 1) / group_size;
}

}  // namespace olive
