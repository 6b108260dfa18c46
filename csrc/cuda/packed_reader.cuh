// How kernels walk a packed weight: which 16 bytes of codes and which scales a lane reads next.
#pragma once

#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/ptx.cuh"

namespace olive::cuda {

// A lane's part of one tile of 16 x 64. kGroups scales a row: two in groups of 32 (or where activations have such),
// else one.
template <int kGroups>
struct TileCodes {
  uint4 codes;
  uint32_t scales[kGroups];  // of the rows lane / 4 and lane / 4 + 8

  // The four bytes of product 0..3 along the columns.
  __device__ uint32_t word(int product) const {
    return product == 0 ? codes.x : product == 1 ? codes.y : product == 2 ? codes.z : codes.w;
  }
};

struct PackedReader;

// Sixteen weight rows from a lane's point of view, and those below them.
struct TileRows {
  const uint4* codes;      // of column tile 0, the lane's 16 bytes
  const uint32_t* scales;  // of group 0, the lane's two rows
  __device__ TileRows below(const PackedReader& reader, int count) const;
};

struct PackedReader {
  const uint4* codes;      // [row tiles, column tiles, 32]
  const uint32_t* scales;  // [row tiles, groups, 8]: two rows each
  int row_tiles, column_tiles, groups;
  int group_shift;  // column tiles per group as a shift; 31 = one group
  int half_shift;   // the same for half a tile, 32 columns

  // `count` row tiles (1, 2 or 4) from `first`, a multiple of count. Those past the end are the last ones there are:
  // their outputs are not written.
  __device__ TileRows rows(int first, int count, int lane) const {
    const int64_t row = first < row_tiles ? first : row_tiles - count;
    return {codes + row * column_tiles * 32 + lane, scales + row * groups * 8 + lane / 4};
  }

  // Has kRowTiles tiles below each other brought to L2, with their scales: five lines of 128 bytes a tile, by a warp.
  template <int kRowTiles>
  __device__ void prefetch_tiles(const TileRows& rows, int column_tile, int lane) const {
    static_assert(kRowTiles * 5 <= 32, "a lane each");
    if (column_tile >= column_tiles || lane >= 5 * kRowTiles) return;
    const int part = lane / kRowTiles;
    const TileRows from = rows.below(*this, lane % kRowTiles);
    if (part < 4) {
      prefetch(from.codes - lane + column_tile * 32 + part * 8);
    } else {
      prefetch(from.scales - lane / 4 + (2 * column_tile >> half_shift) * 8);
    }
  }

  // The tile `below` row tiles further down. A column tile past the end is the last one: activations are zero there.
  template <int kGroups>
  __device__ TileCodes<kGroups> load(const TileRows& rows, int below, int column_tile) const {
    const uint32_t column = column_tile < column_tiles ? column_tile : column_tiles - 1;
    const TileRows from = rows.below(*this, below);
    TileCodes<kGroups> to;
    to.codes = load_once(from.codes + column * 32u);
    if (kGroups == 1) {
      to.scales[0] = __ldg(from.scales + (column >> group_shift) * 8u);
    } else {
      const uint32_t last = static_cast<uint32_t>(groups) - 1, second = (2u * column + 1) >> half_shift;
      to.scales[0] = __ldg(from.scales + (2u * column >> half_shift) * 8u);
      to.scales[kGroups - 1] = __ldg(from.scales + (second < last ? second : last) * 8u);
    }
    return to;
  }
};

__device__ inline TileRows TileRows::below(const PackedReader& reader, int count) const {
  return {codes + count * (static_cast<int64_t>(reader.column_tiles) * 32),
          scales + count * (static_cast<int64_t>(reader.groups) * 8)};
}

// Columns per group as a shift of 32 columns; 31 where a row has one group.
inline int half_tile_shift(int group_size) {
  return group_size == 32 ? 0 : group_size == 64 ? 1 : group_size == 128 ? 2 : 31;
}

inline PackedReader packed_reader(const PackedWeight& weight) {
  PackedReader reader = {};
  reader.codes = reinterpret_cast<const uint4*>(weight.codes);
  reader.scales = reinterpret_cast<const uint32_t*>(weight.scale);
  reader.row_tiles = static_cast<int>(row_tiles(weight.n));
  reader.column_tiles = static_cast<int>(column_tiles(weight.k));
  reader.groups = static_cast<int>(group_count(weight.k, weight.group_size));
  reader.group_shift = weight.group_size == 64 ? 0 : weight.group_size == 128 ? 1 : 31;
  reader.half_shift = half_tile_shift(weight.group_size);
  return reader;
}

}  // namespace olive::cuda
