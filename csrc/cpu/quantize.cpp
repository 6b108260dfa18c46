// Encode, scale search and decode over rows, in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/api.h"

namespace olive {
namespace {

// Rows handed to a thread at once: enough work to pay for a turn, few enough to balance.
int64_t rows_per_turn(int64_t columns) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(columns, 1)); }

template <class Body>
void for_rows(int64_t rows, int64_t turn, Body body) {
  const int64_t turns = (rows + turn - 1) / turn;
#pragma omp parallel for schedule(dynamic) if (turns > 1)
  for (int64_t i = 0; i < turns; ++i) body(i * turn, std::min(rows, (i + 1) * turn));
}

void encode(const Kernels& kernels, const Weight& weight, const Codebook& book, bool paper_pairing,
            const float* importance, const int16_t* scale, uint8_t* codes) {
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    kernels.encode_rows(weight, book, paper_pairing, importance, scale, begin, end, codes);
  });
}

// One scale for the whole tensor: statistics and candidate errors per row in parallel, added first row to last.
bool quantize_per_tensor(const Kernels& kernels, const Weight& weight, const Codebook& book, const Search& search,
                         int16_t* scale) {
  std::vector<float> largest(static_cast<size_t>(weight.n));
  std::vector<double> energy(static_cast<size_t>(weight.n));
  std::atomic<bool> finite{true};
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!kernels.row_statistics(weight, row, &largest[row], &energy[row])) finite = false;
    }
  });
  if (!finite) return false;
  float most = 0.0f;
  double total_energy = 0.0;
  for (int64_t row = 0; row < weight.n; ++row) {
    most = std::max(most, largest[row]);
    total_energy += energy[row];
  }
  *scale = pack_scale(1.0f, false);
  if (most < kTiny) return true;
  const double count = static_cast<double>(weight.n) * static_cast<double>(weight.k);
  const float three_sigma = static_cast<float>(3.0 * std::sqrt(total_energy / count));
  const float pair_base = std::min(most, three_sigma) / book.normal[7];
  const float plain_base = most / (book.plain[15] > 1 ? book.plain[15] : 1);

  const int plain_candidates = book.has_plain ? 2 * search.plain_count : 0;
  const int candidates = search.pair_count + plain_candidates;
  std::vector<double> total(static_cast<size_t>(candidates), 0.0);
  constexpr int64_t kRowsAtOnce = 1024;  // bounds the table of errors
  std::vector<double> errors(static_cast<size_t>(kRowsAtOnce * candidates));
  for (int64_t first = 0; first < weight.n; first += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, weight.n - first);
    for_rows(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.row_errors(weight, book, search, first + row, pair_base, plain_base, &errors[row * candidates]);
      }
    });
    for (int64_t row = 0; row < rows; ++row) {
      for (int i = 0; i < candidates; ++i) total[i] += errors[row * candidates + i];
    }
  }
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < candidates; ++i) {
    const bool plain = i >= search.pair_count;
    const int j = i - search.pair_count;
    const float magnitude =
        plain ? round_scale(plain_base * search.plain_grid[j / 2]) : round_scale(pair_base * search.pair_grid[i]);
    const float value = plain && j % 2 == 1 ? -magnitude : magnitude;
    const double error = total[i] * (static_cast<double>(value) * static_cast<double>(value));
    if (error < least) {
      least = error;
      *scale = pack_scale(value, plain);
    }
  }
  return true;
}

}  // namespace

QuantizeResult ovp_quantize(Isa isa, const Weight& weight, const Codebook& book, const Search& search, uint8_t* codes,
                            int16_t* scale) {
  const Kernels& kernels = kernels_for(isa);
  if (weight.group_size == 0) {
    if (!quantize_per_tensor(kernels, weight, book, search, scale)) return {false};
    encode(kernels, weight, book, search.paper_pairing, search.importance, scale, codes);
    return {true};
  }
  std::atomic<bool> finite{true};
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    if (!kernels.search_rows(weight, book, search, begin, end, codes, scale)) finite = false;
  });
  return {finite};
}

void ovp_encode(Isa isa, const Weight& weight, const Codebook& book, bool paper_pairing, const int16_t* scale,
                uint8_t* codes) {
  encode(kernels_for(isa), weight, book, paper_pairing, nullptr, scale, codes);
}

void ovp_decode(Isa isa, const uint8_t* codes, const int16_t* scale, const Codebook& book, int64_t n, int64_t k,
                int group_size, void* out, Float type) {
  const Kernels& kernels = kernels_for(isa);
  for_rows(n, rows_per_turn(k), [&](int64_t begin, int64_t end) {
    kernels.decode_rows(codes, scale, book, k, group_size, begin, end, out, type);
  });
}

}  // namespace olive
