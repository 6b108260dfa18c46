// Between the canonical layout and the kernels': 16 rows interleaved in units of 32 bits (8 columns).
//
// packed[b, c, 4 r + j] = codes[16 b + r, 4 c + j]. A vector of 64 bytes is 8 columns of 16 rows, a thread reads the
// row blocks it owns as one stream, and because a pair stays in its byte, low nibbles are the even columns and high
// nibbles the odd ones. Rows and columns past the end are zero bytes; their outputs and inputs are not there or zero.
#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/api.h"

namespace olive {
namespace {

constexpr int64_t kLaneBytes = 4;
constexpr int64_t kParallelWeights = int64_t{1} << 18;  // below this waking a thread costs more than it brings

// Ask for huge pages for the whole ones inside a buffer that nothing has touched yet: a matrix of 30 MB is 7000 small
// pages, whose translations a stream at memory speed has to wait for.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  // A kernel without transparent huge pages refuses; then the buffer stays as it is.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace

void ovp_pack(const PackShape& shape, const uint8_t* codes, const int16_t* scale, uint8_t* packed_codes,
              int16_t* packed_scale) {
  const int64_t row_bytes = (shape.k + 1) / 2, vectors = shape.vectors(), groups = shape.groups();
  advise_huge_pages(packed_codes, shape.row_blocks() * vectors * kVectorBytes);
#pragma omp parallel for schedule(static) if (shape.n * shape.k >= kParallelWeights)
  for (int64_t block = 0; block < shape.row_blocks(); ++block) {
    uint8_t* to = packed_codes + block * vectors * kVectorBytes;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t lane = 0; lane < kPackRows; ++lane) {
        const int64_t row = block * kPackRows + lane, from = vector * kLaneBytes;
        uint8_t bytes[kLaneBytes] = {};
        const int64_t count = row < shape.n ? std::min(kLaneBytes, row_bytes - from) : 0;
        if (count > 0) std::memcpy(bytes, codes + row * row_bytes + from, static_cast<size_t>(count));
        std::memcpy(to + vector * kVectorBytes + lane * kLaneBytes, bytes, kLaneBytes);
      }
    }
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t lane = 0; lane < kPackRows; ++lane) {
        const int64_t row = block * kPackRows + lane;
        const int64_t from = shape.group_size == 0 ? 0 : row * groups + group;
        packed_scale[(block * groups + group) * kPackRows + lane] = row < shape.n ? scale[from] : int16_t{0};
      }
    }
  }
}

void ovp_unpack(const PackShape& shape, const uint8_t* packed_codes, const int16_t* packed_scale, uint8_t* codes,
                int16_t* scale) {
  const int64_t row_bytes = (shape.k + 1) / 2, vectors = shape.vectors(), groups = shape.groups();
#pragma omp parallel for schedule(static) if (shape.n * shape.k >= kParallelWeights)
  for (int64_t row = 0; row < shape.n; ++row) {
    const int64_t block = row / kPackRows, lane = row % kPackRows;
    for (int64_t from = 0; from < row_bytes; from += kLaneBytes) {
      const int64_t vector = from / kLaneBytes;
      std::memcpy(codes + row * row_bytes + from,
                  packed_codes + (block * vectors + vector) * kVectorBytes + lane * kLaneBytes,
                  static_cast<size_t>(std::min(kLaneBytes, row_bytes - from)));
    }
    for (int64_t group = 0; group < groups; ++group) {
      if (shape.group_size == 0 && row > 0) continue;  // one scale for all
      scale[row * groups + group] = packed_scale[(block * groups + group) * kPackRows + lane];
    }
  }
}

}  // namespace olive
