// Between the canonical layout of a weight and the packed one of core/fragments.h. The two directions are one loop
// with the assignment turned round, and so inverses.
#include <algorithm>
#include <type_traits>

#include "core/fragments.h"
#include "cuda/api.h"
#include "cuda/runtime.cuh"

namespace olive::cuda {
namespace {

constexpr int kThreads = 256;

// What a direction reads is const.
template <bool kConst, class T>
using Side = std::conditional_t<kConst, const T, T>;

__device__ __forceinline__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t item_step() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// An item is a lane's 16 bytes of a tile.
template <bool kPack>
__global__ void __launch_bounds__(kThreads)
    move_codes_kernel(int64_t n, int64_t k, int64_t items,
                      Side<kPack, uint8_t>* __restrict__ codes,    // [N, ceil(K / 2)], read if kPack
                      Side<!kPack, uint4>* __restrict__ packed) {  // [row tiles, column tiles, 32], written if kPack
  const int64_t pairs = (k + 1) / 2, tiles = column_tiles(k);
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const int lane = static_cast<int>(item % 32);
    const int64_t first_row = item / 32 / tiles * kTileRows, first_pair = item / 32 % tiles * (kTileColumns / 2);
    uint32_t words[4] = {};
    if constexpr (!kPack) {
      const uint4 all = packed[item];
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    }
#pragma unroll
    for (int byte = 0; byte < 16; ++byte) {
      const TilePair at = tile_pair(16 * lane + byte);
      const int64_t row = first_row + at.row, pair = first_pair + at.pair;
      if (row >= n || pair >= pairs) continue;
      auto& code = codes[row * pairs + pair];
      uint32_t& word = words[byte / 4];
      if constexpr (kPack) {
        word |= static_cast<uint32_t>(code) << (byte % 4 * 8);
      } else {
        code = static_cast<uint8_t>(word >> (byte % 4 * 8));
      }
    }
    if constexpr (kPack) packed[item] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// An item is a packed scale.
template <bool kPack>
__global__ void __launch_bounds__(kThreads)
    move_scales_kernel(int64_t n, int64_t groups, bool per_tensor, int64_t items,
                       Side<kPack, int16_t>* __restrict__ scale,      // [N, G], [1, 1] per tensor; read if kPack
                       Side<!kPack, int16_t>* __restrict__ packed) {  // [row tiles, G, 16], written if kPack
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const int64_t row = item / kTileRows / groups * kTileRows + tile_scale_row(static_cast<int>(item % kTileRows));
    const int64_t at = per_tensor ? 0 : row * groups + item / kTileRows % groups;
    if constexpr (kPack) {
      packed[item] = row < n ? scale[at] : int16_t{0};
    } else if (row < (per_tensor ? 1 : n)) {
      scale[at] = packed[item];
    }
  }
}

Launch shape_of(int64_t items, uintptr_t stream) {
  const int64_t most = current_device().multiprocessors * int64_t{32};
  const int64_t blocks = std::min((items + kThreads - 1) / kThreads, most);
  return {static_cast<unsigned>(blocks), 1, kThreads, 0, 1, stream};
}

template <bool kPack>
void move(const char* name, int64_t n, int64_t k, int group_size, Side<kPack, uint8_t>* codes,
          Side<kPack, int16_t>* scale, Side<!kPack, uint8_t>* packed_codes, Side<!kPack, int16_t>* packed_scale,
          uintptr_t stream) {
  const int64_t groups = group_count(k, group_size);
  const int64_t lanes = row_tiles(n) * column_tiles(k) * 32, scales = row_tiles(n) * groups * kTileRows;
  launch(name, move_codes_kernel<kPack>, shape_of(lanes, stream), n, k, lanes, codes,
         reinterpret_cast<Side<!kPack, uint4>*>(packed_codes));
  launch(name, move_scales_kernel<kPack>, shape_of(scales, stream), n, groups, group_size == 0, scales, scale,
         packed_scale);
}

}  // namespace

void ovp_pack(int64_t n, int64_t k, int group_size, const uint8_t* codes, const int16_t* scale, uint8_t* packed_codes,
              int16_t* packed_scale, uintptr_t stream) {
  move<true>("ovp_pack", n, k, group_size, codes, scale, packed_codes, packed_scale, stream);
}

void ovp_unpack(int64_t n, int64_t k, int group_size, const uint8_t* packed_codes, const int16_t* packed_scale,
                uint8_t* codes, int16_t* scale, uintptr_t stream) {
  move<false>("ovp_unpack", n, k, group_size, codes, scale, packed_codes, packed_scale, stream);
}

}  // namespace olive::cuda
