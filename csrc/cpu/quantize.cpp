// Encode, scale search, decode and the quantizing of activations, over rows in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/api.h"
#include "cpu/parallel.h"

namespace olive {
namespace {

void encode(const Kernels& kernels, const Weight& weight, const Codebook& book, bool paper_pairing,
            const float* importance, const int16_t* scale, uint8_t* codes) {
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    kernels.encode_rows(weight, book, paper_pairing, importance, scale, begin, end, codes);
  });
}

// Largest magnitude and root mean square (times three) of a whole tensor; rows are added first to last.
struct TensorStatistics {
  bool finite;
  float largest, three_sigma;
};

TensorStatistics tensor_statistics(const Kernels& kernels, const Weight& weight) {
  std::vector<float> largest(static_cast<size_t>(weight.n));
  std::vector<double> energy(static_cast<size_t>(weight.n));
  std::atomic<bool> finite{true};
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!kernels.row_statistics(weight, row, &largest[row], &energy[row])) finite = false;
    }
  });
  float most = 0.0f;
  double total_energy = 0.0;
  for (int64_t row = 0; row < weight.n; ++row) {
    most = std::max(most, largest[row]);
    total_energy += energy[row];
  }
  const double count = static_cast<double>(weight.n) * static_cast<double>(weight.k);
  return {finite, most, static_cast<float>(3.0 * std::sqrt(total_energy / count))};
}

// Errors of so many candidates over all rows, added first to last. row_errors(row, errors) gives those of one row.
template <class RowErrors>
std::vector<double> tensor_errors(int64_t rows, int candidates, const RowErrors& row_errors) {
  std::vector<double> total(static_cast<size_t>(candidates), 0.0);
  constexpr int64_t kRowsAtOnce = 1024;  // bounds the table of errors
  std::vector<double> errors(static_cast<size_t>(kRowsAtOnce * candidates));
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t some = std::min(kRowsAtOnce, rows - first);
    for_rows(some, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) row_errors(first + row, &errors[row * candidates]);
    });
    for (int64_t row = 0; row < some; ++row) {
      for (int i = 0; i < candidates; ++i) total[i] += errors[row * candidates + i];
    }
  }
  return total;
}

// Keeps the scale of least error; errors are in squared units of the scale.
class Best {
 public:
  void offer(float scale, bool plain, double error) {
    error *= static_cast<double>(scale) * static_cast<double>(scale);
    if (error < least_) {
      least_ = error;
      stored_ = pack_scale(scale, plain);
    }
  }
  int16_t stored() const { return stored_; }

 private:
  double least_ = std::numeric_limits<double>::infinity();
  int16_t stored_ = pack_scale(1.0f, false);
};

// One scale for the whole tensor.
bool quantize_per_tensor(const Kernels& kernels, const Weight& weight, const Codebook& book, const Search& search,
                         int16_t* scale) {
  const TensorStatistics found = tensor_statistics(kernels, weight);
  if (!found.finite) return false;
  Best best;
  if (found.largest >= kTiny) {
    const float pair_base = std::min(found.largest, found.three_sigma) / book.normal[7];
    const float plain_base = found.largest / (book.plain[15] > 1 ? book.plain[15] : 1);
    const int plain_candidates = book.has_plain ? 2 * search.plain_count : 0;
    const auto row_errors = [&](int64_t row, double* errors) {
      kernels.row_errors(weight, book, search, row, pair_base, plain_base, errors);
    };
    const auto errors = tensor_errors(weight.n, search.pair_count + plain_candidates, row_errors);
    for (int i = 0; i < search.pair_count; ++i) {
      best.offer(round_scale(pair_base * search.pair_grid[i]), false, errors[i]);
    }
    for (int j = 0; j < plain_candidates; ++j) {
      const float magnitude = round_scale(plain_base * search.plain_grid[j / 2]);
      best.offer(j % 2 == 1 ? -magnitude : magnitude, true, errors[search.pair_count + j]);
    }
  }
  *scale = best.stored();
  return true;
}

bool quantize8_per_tensor(const Kernels& kernels, const Weight& weight, const Search& search, int16_t* scale) {
  const TensorStatistics found = tensor_statistics(kernels, weight);
  if (!found.finite) return false;
  Best best;
  if (found.largest >= kTiny) {
    std::vector<float> scales(static_cast<size_t>(search.pair_count));
    for (int i = 0; i < search.pair_count; ++i) {
      scales[i] = round_scale(std::min(found.largest, search.pair_grid[i] * found.three_sigma) / 127.0f);
    }
    const auto row_errors = [&](int64_t row, double* errors) {
      kernels.row8_errors(weight, search.paper_pairing, row, scales.data(), search.pair_count, errors);
    };
    const auto errors = tensor_errors(weight.n, search.pair_count, row_errors);
    for (int i = 0; i < search.pair_count; ++i) best.offer(scales[i], false, errors[i]);
  }
  *scale = best.stored();
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

QuantizeResult ovp8_quantize(Isa isa, const Weight& weight, const Search& search, uint8_t* codes, int16_t* scale) {
  const Kernels& kernels = kernels_for(isa);
  if (weight.group_size == 0) {
    if (!quantize8_per_tensor(kernels, weight, search, scale)) return {false};
    for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
      kernels.encode8_rows(weight, search.paper_pairing, scale, begin, end, codes);
    });
    return {true};
  }
  std::atomic<bool> finite{true};
  for_rows(weight.n, rows_per_turn(weight.k), [&](int64_t begin, int64_t end) {
    if (!kernels.search8_rows(weight, search, begin, end, codes, scale)) finite = false;
  });
  return {finite};
}

void ovp8_decode(Isa isa, const uint8_t* codes, const int16_t* scale, int64_t n, int64_t k, int group_size, void* out,
                 Float type) {
  const Kernels& kernels = kernels_for(isa);
  for_rows(n, rows_per_turn(k), [&](int64_t begin, int64_t end) {
    kernels.decode8_rows(codes, scale, k, group_size, begin, end, out, type);
  });
}

void ovp_compensate(Isa isa, const Compensation& run) {
  const Kernels& kernels = kernels_for(isa);
  constexpr int64_t kTurn = 64;  // rows; whole lane vectors
  for_rows(run.rows, kTurn, [&](int64_t begin, int64_t end) { kernels.compensate_rows(run, begin, end); });
}

void quantize_activations(Isa isa, const ActivationSource& source, const LevelTarget& target) {
  const Kernels& kernels = kernels_for(isa);
  for_rows(source.rows, rows_per_turn(source.k),
           [&](int64_t begin, int64_t end) { kernels.level_rows(target, source, begin, end); });
}

}  // namespace olive
