// AMX: tdpbssd and tdpbsud multiply 16 activation rows with 16 weight rows, 64 columns per instruction.
//
// Tiles are 16 x 64 bytes. Per block of columns and 32 weight rows: high and low digits (and float32's third digit)
// each get their own int32 tiles, which are stored, combined and added to the float32 sums after every block, because
// each block has its own scales. With blocks of 128 that is 8 products (128 clocks of the unit) beside about 256 vector
// instructions on other ports.
// Levels are one digit: 32 activation rows at a time, so that each loaded tile is used twice. Weights are signed bytes
// then, and need no offset. A block of 128 again is 8 products, beside 64 sums of five vector instructions.
#include "cpu/lanes.h"

namespace olive {
namespace amx {
namespace {

#include "cpu/linear_common.inl"

#include "cpu/decode_avx512.inl"

#include "cpu/linear_bytes.inl"

#include "cpu/linear_vnni.inl"

constexpr int kTile = 16;    // rows of a tile
constexpr int kFewRows = 4;  // up to here a tile would be mostly padding and the decode shared by too few rows

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

// Levels: tiles 0..3 sums, 4 and 5 activation rows, 6 and 7 the two row blocks.
// bfloat16 and float16: tiles 0..3 sums, 4 and 5 high and low digits, 6 and 7 the two row blocks.
// float32: tiles 0..5 sums, 6 a digit, 7 a row block.
// Sums are 16 x 16 int32; digits 16 rows of `depth` bytes; weights depth / 4 rows of 16 x 4 bytes.
inline void configure(int digits, int depth) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    const bool activations = digits == 3 ? tile == 6 : tile == 4 || tile == 5;
    const bool weights = digits == 3 ? tile == 7 : tile >= 6;
    config.bytes_per_row[tile] = static_cast<uint16_t>(activations ? depth : kVectorBytes);
    config.rows[tile] = static_cast<uint8_t>(weights ? depth / 4 : kTile);
  }
  asm volatile("" ::: "memory");  // gcc 12 knows of 8 of the 64 bytes that the next instruction reads
  _tile_loadconfig(&config);
}

struct Sums {
  alignas(64) int32_t tile[6][kTile][kTile];  // [digit * 2 + row block]; levels: [activation tile * 2 + row block]
};

constexpr int kNextRowBlock = kMaxBlock * kPackRows;  // bytes between the row blocks of a decoded panel

inline void multiply_levels(const Activations& x, const uint8_t* levels, int64_t at, int depth, bool second,
                            Sums* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* rows = x.low + at;
  for (int k = 0; k < x.block; k += depth) {
    const uint8_t* weights = levels + k * kPackRows;
    _tile_loadd(4, rows + k, x.block);
    _tile_loadd(6, weights, kVectorBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, weights + kNextRowBlock, kVectorBytes);
    _tile_dpbssd(1, 4, 7);
    if (second) {
      _tile_loadd(5, rows + k + kTile * x.block, x.block);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums->tile[0], kVectorBytes);
  _tile_stored(1, sums->tile[1], kVectorBytes);
  if (!second) return;
  _tile_stored(2, sums->tile[2], kVectorBytes);
  _tile_stored(3, sums->tile[3], kVectorBytes);
}

inline void multiply_15(const Activations& x, const uint8_t* levels, int64_t at, int depth, Sums* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < x.block; k += depth) {
    const uint8_t* weights = levels + k * kPackRows;
    _tile_loadd(6, weights, kVectorBytes);
    _tile_loadd(4, x.high + at + k, x.block);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights + kNextRowBlock, kVectorBytes);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, x.low + at + k, x.block);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums->tile[0], kVectorBytes);
  _tile_stored(1, sums->tile[1], kVectorBytes);
  _tile_stored(2, sums->tile[2], kVectorBytes);
  _tile_stored(3, sums->tile[3], kVectorBytes);
}

inline void multiply_23(const Activations& x, const uint8_t* levels, int64_t at, int depth, Sums* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int k = 0; k < x.block; k += depth) {
    const uint8_t* weights = levels + k * kPackRows;
    _tile_loadd(7, weights, kVectorBytes);
    _tile_loadd(6, x.high + at + k, x.block);
    _tile_dpbsud(0, 6, 7);
    _tile_loadd(6, x.low + at + k, x.block);
    _tile_dpbsud(2, 6, 7);
    _tile_loadd(6, x.rest8 + at + k, x.block);
    _tile_dpbsud(4, 6, 7);
    _tile_loadd(7, weights + kNextRowBlock, kVectorBytes);
    _tile_dpbsud(5, 6, 7);
    _tile_loadd(6, x.low + at + k, x.block);
    _tile_dpbsud(3, 6, 7);
    _tile_loadd(6, x.high + at + k, x.block);
    _tile_dpbsud(1, 6, 7);
  }
  _tile_stored(0, sums->tile[0], kVectorBytes);
  _tile_stored(1, sums->tile[1], kVectorBytes);
  _tile_stored(2, sums->tile[2], kVectorBytes);
  _tile_stored(3, sums->tile[3], kVectorBytes);
  _tile_stored(4, sums->tile[4], kVectorBytes);
  _tile_stored(5, sums->tile[5], kVectorBytes);
}

// The sums of one activation row with one row block, from the tiles.
template <int kDigits>
inline F16 add_sums(const Activations& x, const Sums& sums, int64_t index, int row, int n, F16 scale_w, F16 total) {
  if constexpr (kDigits == 1) {
    const I16 sum = load<I16>(sums.tile[row / kTile * kPanel + n][row % kTile]);
    return accumulate(x, total, sum, I16{}, x.scale[index], scale_w);
  }
  const I16 s15 = combine_s15(load<I16>(sums.tile[n][row]), load<I16>(sums.tile[kPanel + n][row]) + x.offset[index]);
  I16 rest = {};
  if (kDigits == 3) rest = load<I16>(sums.tile[2 * kPanel + n][row]) + x.rest_offset[index];
  return accumulate(x, total, s15, rest, x.scale[index], scale_w);
}

template <int kDigits>
inline void linear_amx(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  constexpr int kStep = kDigits == 1 ? 2 * kTile : kTile;  // activation rows multiplied together
  const Activations& x = problem.x;
  const Decoder512 decoder(problem.book, kDigits == 1 ? 0 : kOffset);
  const int depth = x.block < kVectorBytes ? x.block : kVectorBytes;
  alignas(64) uint8_t levels[kPanel * kMaxBlock * kPackRows] = {};
  F16 total[kPanel * kTileRows], scale_w[kPanel] = {};
  Sums sums;
  configure(kDigits, depth);
  for (int64_t row_block = begin; row_block < end; row_block += kPanel) {
    const int count = end - row_block < kPanel ? 1 : kPanel;
    __builtin_memset(total, 0, sizeof(total));
    for (int64_t block = 0; block < x.blocks(); ++block) {
      decode_panel(problem, decoder, row_block, count, block, levels, scale_w);
      asm volatile("" ::: "memory");  // gcc 12 does not know that tile loads read memory: the levels must be there
      for (int i = 0; i < count; ++i) {
        const uint8_t* next = next_codes(problem, row_block + i, block);
        for (int at = 0; at < x.block * kPackRows / 2; at += kVectorBytes) prefetch(next + at);
      }
      for (int64_t m = m_begin; m < m_end; m += kStep) {
        const int64_t at = x.at(m, block);
        const int rows = m_end - m < kStep ? static_cast<int>(m_end - m) : kStep;
        if constexpr (kDigits == 1) multiply_levels(x, levels, at, depth, rows > kTile, &sums);
        if constexpr (kDigits == 2) multiply_15(x, levels, at, depth, &sums);
        if constexpr (kDigits == 3) multiply_23(x, levels, at, depth, &sums);
        for (int i = 0; i < rows; ++i) {
          for (int n = 0; n < count; ++n) {
            F16& sum = total[n * kTileRows + (m - m_begin) + i];
            sum = add_sums<kDigits>(x, sums, x.index(m + i, block), i, n, scale_w[n], sum);
          }
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t m = m_begin; m < m_end; ++m) {
        store_outputs(problem, m, row_block + i, total[i * kTileRows + (m - m_begin)]);
      }
    }
  }
  _tile_release();
}

void linear(const Linear& problem, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
  if (m_end - m_begin <= kFewRows) return linear_vnni(problem, m_begin, m_end, begin, end);
  if (problem.x.digits == 1) return linear_amx<1>(problem, m_begin, m_end, begin, end);
  if (problem.x.digits == 2) return linear_amx<2>(problem, m_begin, m_end, begin, end);
  linear_amx<3>(problem, m_begin, m_end, begin, end);
}

}  // namespace

Kernels kernels() {
  Kernels set = avx512_vnni::kernels();
  set.linear = linear;
  set.tile_rows = kTile;
  return set;
}

}  // namespace amx
}  // namespace olive
